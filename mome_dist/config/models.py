"""The frozen models of a run that the Hugging Face hub has (`mome_dist.hub`): fetched once, pinned to their commit.

It happens where a command is typed, before any process or job is started: what is started is given the commits, and
finds the files in the cache. A rank never fetches. No torch here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mome_dist.config.derived import encoder_sections, frozen_sections
from mome_dist.config.load import config_of, load_config, load_saved_config, names_key
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.hub import HubModel, fetch, portable
from mome_dist.trained import EXPORT, Trained, find_trained, with_key

SECTIONS = ("llm", "audio_encoder", "video_encoder")
NEEDED: Mapping[str, Callable[[RunConfig], list[str]]] = {
    "mome_dist.commands.features": encoder_sections,
    "tools.cache_features": encoder_sections,  # its door
}
"""Which frozen models a module needs that takes a run's overrides, beside `mome_dist.train`."""


def is_rank() -> bool:
    """Whether this process is one of a world, which a launcher has started."""
    return "RANK" in os.environ


def settle_models(config: RunConfig, sections: Sequence[str] | None = None, weights: bool = True) -> list[str]:
    """Put the directories of the hub's models that a run uses into its configuration.

    A run that is resumed keeps the commits that it began with, also when a branch has moved.

    Args:
        config: changed in place.
        sections: of the configuration; None for all that the run uses.
        weights: whether they are needed; a plan reads the settings only.

    Returns:
        Overrides for the processes of the run, with the commits of models that were named without.

    Raises:
        UserError: for a model that cannot be had, or is not the one that the run began with.
    """
    given = {section: getattr(config, section) for section in SECTIONS}
    named = {section: HubModel.parse(f"{section}.path", values.path) for section, values in given.items()}
    if not any(named.values()):
        return []
    check_values(config)  # a wrong one is told before gigabytes are fetched
    overrides = []
    for section in frozen_sections(config) if sections is None else sections:
        model, key = named[section], f"{section}.path"
        if model is None:
            continue
        directory = fetch(key, _continued(section, model, config), is_rank(), weights)
        given[section].path, pinned = str(directory), portable(str(directory))
        if pinned != str(model):
            overrides.append(f"{key}={pinned}")
            if not is_rank():
                print(f"{key}: {model} is {pinned}", file=sys.stderr, flush=True)
    return overrides


def settle_evaluation(arguments: Sequence[str]) -> list[str]:
    """Fetch the hub's models that ``mome_dist.evaluate`` will need; return its arguments, with commits.

    Raises:
        UserError: for a model that cannot be had.
    """
    arguments = with_key(arguments, "checkpoint")
    given = dict(argument.partition("=")[::2] for argument in arguments)
    config = config_of_trained(find_trained(given["checkpoint"])) if given.get("checkpoint") else None
    settled = list(arguments)
    for section in [] if config is None else frozen_sections(config):
        model = HubModel.parse(section, given.get(section) or getattr(config, section).path)
        if model is not None:
            pinned = portable(str(fetch(f"{section}.path", model, is_rank())))
            settled += [f"{section}={pinned}"] if section in given else []
    return settled


def settle_arguments(module: str, arguments: Sequence[str]) -> list[str]:
    """Fetch the hub's models that any other module will need; return its arguments, with commits.

    A module of `NEEDED` finds them through the configuration that its arguments make, so that an experiment may name
    them. Of others only ``llm.path=hf://...`` and the like are known.

    Raises:
        UserError: for a model that cannot be had, or overrides that make no configuration.
    """
    if module in NEEDED:
        # Options and their values are the module's own, and an unknown key is refused there.
        config = load_config([word for word in arguments if names_key(word)])
        return [*arguments, *settle_models(config, NEEDED[module](config))]
    return [_pinned(word) for word in arguments]


def _pinned(word: str) -> str:
    """An argument, with the commit if it sets the path of a frozen model to one of the hub, which is then fetched."""
    key, _, value = word.partition("=")
    model = HubModel.parse(key, value) if key in [f"{section}.path" for section in SECTIONS] else None
    return word if model is None else f"{key}={portable(str(fetch(key, model, is_rank())))}"


def _continued(section: str, model: HubModel, config: RunConfig) -> HubModel:
    """The model at the commit that the run began with, if it is resumed.

    Raises:
        UserError: the run began with another commit than the one that is asked for.
    """
    file = _newest_config(Path(config.output_dir))
    if not config.training.resume or file is None or model.commit is not None:
        return model
    key = f"{section}.path"
    begun = HubModel.parse(key, getattr(load_saved_config(file), section).path)
    if begun is None or begun.repository != model.repository:
        return model  # whether it has the same weights is found out by their hashes
    # A branch that has moved meant this commit when it was last asked for.
    if model.revision is None or model.last_seen() == begun.commit:
        return begun
    commit = fetch(key, model, is_rank(), weights=False).name
    if commit != begun.commit:
        raise UserError(
            f"{key}={model} is commit {commit} now, but {config.output_dir} was trained with {begun}: give that, or "
            f"hf://{model.repository} for whatever the run began with, or start anew with training.resume=false."
        )
    return begun


def _newest_config(run: Path) -> Path | None:
    """The configuration in the newest checkpoint of a run (`mome_dist.checkpoint.format`, which needs torch)."""
    latest = run / "checkpoints" / "latest"
    file = latest.parent / latest.read_text(encoding="utf-8").strip() / "config.yaml" if latest.is_file() else None
    return file if file is not None and file.is_file() else None


def config_of_trained(trained: Trained) -> RunConfig:
    """The configuration of something trained; that of an export is not checked against its hash."""
    if trained.kind != EXPORT:
        return load_saved_config(trained.config)
    try:
        document = json.loads(trained.config.read_text(encoding="utf-8"))
        return config_of(document["config"], trained.config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{trained.config} is no config.json of an export ({error!r}); copy or export it again."
        ) from error
