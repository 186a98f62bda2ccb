"""Which checkpoint of a run is used: the latest, the best, or the mean of several.

The best is the one with the lowest validation loss among those that were validated at exactly their step. The test
split has no part in it: a number that chose the model is no measurement of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from mome_dist.checkpoint.adapter import is_adapter, read_adapter
from mome_dist.checkpoint.average import average
from mome_dist.checkpoint.format import INDEX, checkpoints_of, find_checkpoint
from mome_dist.checkpoint.saved import Saved, read_checkpoint
from mome_dist.errors import UserError
from mome_dist.trained import count_of_average
from mome_dist.training_log import TrainingLog

METRICS = "metrics.jsonl"
_STEP = re.compile(r"step-(\d+)")


def read_saved(path: str | Path, select: str = "latest") -> Saved:
    """Trained weights from a run, one of its checkpoints, or an export.

    Args:
        path: directory.
        select: "latest", "best" or "average:N" (the N newest); the last two need the directory of a run.

    Raises:
        UserError: for another ``select``, a directory that is no run where one is needed, or a run without such
            checkpoints.
    """
    counted = count_of_average(select)
    if select == "latest":
        return read_adapter(path) if is_adapter(path) else read_checkpoint(find_checkpoint(path))
    if not checkpoints_of(path):
        raise UserError(f"select={select} needs the directory of a run, and {path} has no checkpoints/step-*.")
    if counted is None:
        return read_checkpoint(best_checkpoint(path))
    return average([read_checkpoint(directory) for directory in newest_checkpoints(path, counted)])


def newest_checkpoints(run: str | Path, count: int) -> list[Path]:
    """The ``count`` newest checkpoints of a run, newest first.

    Raises:
        UserError: if there are fewer; training keeps ``training.keep_checkpoints`` of them.
    """
    whole = [directory for directory in checkpoints_of(run) if (directory / INDEX).is_file()]
    if not 1 <= count <= len(whole):
        raise UserError(
            f"{run} has {len(whole)} checkpoints, and {count} were asked for: ask for 1 to {len(whole)}; "
            "training.keep_checkpoints says how many training keeps."
        )
    return whole[:count]


def best_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run with the lowest validation loss; of equal ones the earliest.

    Raises:
        UserError: if none was validated at its step.
    """
    found = validated_checkpoints(run)
    if not found:
        raise UserError(
            f"{run}: no checkpoint was validated at its step, so none is known to be the best; make "
            "training.validate_every divide training.save_every, or take select=latest."
        )
    return best_of(found)


def best_of(validated: Mapping[Path, float]) -> Path:
    """The one of the lowest loss; of equal ones the earliest."""
    return min(validated, key=lambda directory: (validated[directory], directory.name))


def validated_checkpoints(run: str | Path) -> dict[Path, float]:
    """Mean validation loss over all views of each checkpoint that has a finite one in ``metrics.jsonl``."""
    steps, losses = TrainingLog.read(Path(run) / METRICS).validation_series(None)
    by_step = dict(zip(map(int, steps), map(float, losses), strict=True))
    found = {}
    for directory in checkpoints_of(run):
        match = _STEP.fullmatch(directory.name)
        loss = by_step.get(int(match[1])) if match is not None else None
        if loss is not None and math.isfinite(loss) and (directory / INDEX).is_file():
            found[directory] = loss
    return found
