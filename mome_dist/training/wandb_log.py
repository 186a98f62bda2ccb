"""Weights & Biases: one run there for one directory of a run here, however often it is stopped and started again.

The id of the run there lies in the directory, in ``wandb_id``. What is logged of steps that a resume trains again is
what W&B has already: it keeps the first. Without internet, ``training.wandb_mode=offline`` writes into ``wandb/`` of
the directory, one folder a start, which ``wandb sync`` sends as one run later. The key of an account is W&B's own
affair (``wandb login``, or ``WANDB_API_KEY``): it is neither read nor written here.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mome_dist.config.load import portable_config
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.files import write_once, write_text
from mome_dist.versions import commit_here, version_of

_MODES: dict[str, Literal["online", "offline"] | None] = {"auto": None, "online": "online", "offline": "offline"}
ID = "wandb_id"
PACKAGES = ("mome_dist", "torch", "megatron-core", "deepspeed", "transformers")


class WandbRun:
    """A run on W&B that gets numbers by step.

    Args:
        config: of the run; ``training.wandb_project`` is set. All of it goes to W&B, with versions and the commit.

    Raises:
        UserError: W&B refuses to start the run.
    """

    def __init__(self, config: RunConfig) -> None:
        import wandb  # an extra: `mome_dist.preflight` has seen that it is there

        settings, folder = config.training, Path(config.output_dir)
        about = {
            **dataclasses.asdict(portable_config(config)),
            "commit": commit_here(),
            "versions": {name: version_of(name) for name in PACKAGES},
        }
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                group=settings.wandb_group,
                tags=settings.wandb_tags or None,
                mode=_MODES[settings.wandb_mode],
                name=config.name,
                id=_own_id(folder / ID, settings.resume),
                resume="allow",
                dir=folder,
                config=about,
                allow_val_change=True,  # a resume may have other steps, or a later commit
                # The lines of a run are in its own log, where they are not sent anywhere.
                settings=wandb.Settings(console="off", disable_code=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"training.wandb_project={settings.wandb_project}: W&B did not start the run ({error}): run `wandb "
                "login`, set training.wandb_mode=offline, or leave out training.wandb_project."
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step; several calls may have the same."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Send or write what is left."""
        self._run.finish()


def _own_id(path: Path, resume: bool) -> str:
    """The id of this directory's run; a new one where a run begins that continues none."""
    new = uuid.uuid4().hex
    if resume:
        return write_once(path, new).strip()
    write_text(path, new)
    return new
