"""What is tried: a list of hand-picked settings, and single changes to the best one found so far.

A setting is a plain DeepSpeed configuration and Hydra overrides for what DeepSpeed does not know: the number of
microbatches, the expert-parallel size, the capacity factor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mome_dist.config.deepspeed.file import settled
from mome_dist.config.deepspeed.keys import BUCKET_ELEMENTS
from mome_dist.config.derived import layout_of
from mome_dist.config.load import load_config
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.parallel.layout import divisors
from mome_dist.planning.hardware import Cluster
from mome_dist.planning.job import Candidate, Job
from mome_dist.planning.memory import memory
from mome_dist.text_files import read_json

BUCKETS = (5_000_000, BUCKET_ELEMENTS, 200_000_000)  # elements


@dataclass(frozen=True)
class Trial:
    """One setting.

    Attributes:
        deepspeed: the content of a DeepSpeed JSON file.
        overrides: Hydra overrides, by key.
        hand_picked: whether it comes from a list and not from the search.
    """

    deepspeed: dict[str, Any]
    overrides: dict[str, str] = field(default_factory=dict)
    hand_picked: bool = False

    @property
    def name(self) -> str:
        """In short; equal settings have equal names."""
        zero = dict(self.deepspeed.get("zero_optimization", {}))
        words = [f"zero{zero.pop('stage', 0)}"]
        if isinstance(zero.get("reduce_bucket_size"), int):
            words.append(f"bucket {zero.pop('reduce_bucket_size'):,}")
        words += ["overlap"] if zero.pop("overlap_comm", False) else []
        rest = {key: value for key, value in self.deepspeed.items() if key != "zero_optimization"} | zero
        words += [f"{key}={json.dumps(value)}" for key, value in sorted(rest.items())]
        words += [f"{key.rpartition('.')[2]} {value}" for key, value in sorted(self.overrides.items())]
        return ", ".join(words)

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        return stage if isinstance(stage, int) else 0

    def arguments(self) -> list[str]:
        """The overrides as words of a command line."""
        return [f"{key}={value}" for key, value in self.overrides.items()]


def zero_settings(stage: int, bucket: int = BUCKETS[1], overlap: bool = False) -> dict[str, Any]:
    """A plain DeepSpeed configuration."""
    if stage == 0:
        return {"zero_optimization": {"stage": 0}}
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": overlap}}


def hand_picked(accumulation: int) -> list[Trial]:
    """Twelve settings that somebody would try: every stage with small, usual and large buckets, overlap, and more
    microbatches (twice the configured ``accumulation``)."""
    settings = [zero_settings(0)]
    settings += [zero_settings(stage, bucket) for stage in (1, 2) for bucket in BUCKETS]
    settings += [zero_settings(stage, overlap=True) for stage in (1, 2)]
    trials = [Trial(each, {}, True) for each in settings]
    more = {"data.accumulation": str(2 * accumulation)}
    return trials + [Trial(zero_settings(stage), more, True) for stage in (0, 1, 2)]


def read_trials(path: Path) -> list[Trial]:
    """Settings from a JSON file: a list of ``{"deepspeed": {...}, "overrides": {"key": "value"}}``.

    Raises:
        UserError: if the file is not like that.
    """
    try:
        found = read_json(path)
        return [
            Trial(
                dict(each["deepspeed"]),
                {str(key): str(value) for key, value in each.get("overrides", {}).items()},
                True,
            )
            for each in found
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = '[{"deepspeed": {...}, "overrides": {"key": "value"}}, ...]'
        raise UserError(f"--trials {path}: give a JSON list {wanted} ({error!r}).") from error


def neighbours(
    best: Trial, config: RunConfig, world: int, job: Job, capacity_factors: Sequence[float]
) -> Iterator[Trial]:
    """Settings that differ from the best one in one thing; ``job`` is that of the configuration."""
    zero = best.deepspeed.get("zero_optimization", {})
    stage, bucket, overlap = best.stage, zero.get("reduce_bucket_size", BUCKETS[1]), zero.get("overlap_comm", False)
    settings = [zero_settings(other, bucket, overlap) for other in (0, 1, 2) if other != stage]
    if stage:
        settings += [zero_settings(stage, other, overlap) for other in BUCKETS if other != bucket]
        settings += [zero_settings(stage, bucket, not overlap)]
    for changed in settings:
        yield Trial(_merged(best.deepspeed, changed), best.overrides)
    layout = layout_of(config, world)
    accumulations = [n for n in job.accumulations(layout.dp) if n <= 8 * config.data.fixed_accumulation]
    axes: dict[str, list[Any]] = {
        "data.accumulation": accumulations,
        "parallel.ep": [ep for ep in divisors(layout.dp) if (config.mome.spread or 1) % ep == 0],
        "mome.capacity_factor": list(capacity_factors) if config.mome.spread else [],
    }
    present = {
        "data.accumulation": config.data.accumulation,
        "parallel.ep": config.parallel.ep,
        "mome.capacity_factor": config.mome.capacity_factor,
    }
    for key, values in axes.items():
        now = best.overrides.get(key, str(present[key]))
        for value in values:
            if str(value) != now:
                overrides = {**best.overrides, key: str(value)}
                if str(value) == str(present[key]):
                    del overrides[key]
                yield Trial(best.deepspeed, overrides)


def _merged(settings: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Settings with other ones of ZeRO; whatever else a user has in the file stays."""
    zero = {**settings.get("zero_optimization", {}), **changed["zero_optimization"]}
    return {**settings, "zero_optimization": zero if zero["stage"] else {"stage": 0}}


@lru_cache(maxsize=64)  # composing takes longer than all else here, and many trials differ in DeepSpeed's part only
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    config = load_config(overrides)
    check_values(config)
    return config


def refusal(trial: Trial, base: Sequence[str], world: int, job: Job, cluster: Cluster | None) -> str | None:
    """Why a trial need not be run; None if it should be.

    Args:
        base: the user's overrides.
        job: of the user's configuration.
        cluster: whose memory a rank has; None if it is not known.
    """
    try:
        config = _composed((*base, *trial.arguments()))
        layout = layout_of(config, world)
        settled(trial.deepspeed, config, layout.dp, "the DeepSpeed configuration")
    except UserError as error:
        return str(error)
    if (config.mome.spread or 1) % layout.ep:
        return f"parallel.ep={layout.ep} does not divide mome.routed_experts={config.mome.routed_experts}"
    chunks = config.data.fixed_accumulation * layout.dp
    if job.batch_size < chunks or (job.fixed_batch and job.batch_size % chunks):
        return f"a batch of {config.data.describe_batch()} cannot be cut that often"
    if cluster is None:
        return None
    dispatch = {"auto": "gather" if layout.ep > 1 else "local"}.get(config.mome.dispatch, config.mome.dispatch)
    candidate = Candidate(layout, min(trial.stage, 2), dispatch, config.data.fixed_accumulation)
    need = max(memory(job, candidate, stage, cluster.runtime).total for stage in range(layout.pp))
    if need > cluster.memory:
        return f"would need {need / 1e9:.1f} GB of {cluster.memory / 1e9:.1f} GB"
    return None
