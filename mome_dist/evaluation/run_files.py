"""What a run directory holds, read together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome_dist.checkpoint.format import CONFIG, newest_checkpoint
from mome_dist.config.load import load_saved_config
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.evaluation.activations import Activations
from mome_dist.evaluation.results import ACTIVATIONS, RESULTS, read_results
from mome_dist.training_log import CONFLICTS, ConflictLog, RoutingLog, TrainingLog


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; None for what is not there (yet)."""

    directory: Path
    config: RunConfig
    log: TrainingLog
    routing: RoutingLog | None
    conflicts: ConflictLog | None
    results: Mapping[str, Any] | None
    activations: Activations | None

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Read a run directory. Raises UserError if it is none, or a file in it is damaged."""
        checkpoint = newest_checkpoint(directory)
        config = directory / CONFIG if (directory / CONFIG).is_file() or checkpoint is None else checkpoint / CONFIG
        if not config.is_file():
            raise UserError(
                f"run={directory}: no {CONFIG} and no checkpoint there; give the directory of a run, such as "
                "runs/quickstart."
            )
        evaluation = directory / "evaluation"
        results, activations = evaluation / RESULTS, evaluation / ACTIVATIONS
        return cls(
            directory,
            load_saved_config(config),
            TrainingLog.read(directory / "metrics.jsonl"),
            RoutingLog.read(directory / "routing.jsonl"),
            ConflictLog.read(directory / CONFLICTS),
            read_results(results) if results.is_file() else None,
            Activations.load(activations) if activations.is_file() else None,
        )
