"""Settle ``precision=auto`` of a run's frozen models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from mome_dist.checkpoint.format import CONFIG, newest_checkpoint
from mome_dist.config import RunConfig
from mome_dist.config.load import load_saved_config
from mome_dist.llm.precision import fast_precision

FROZEN = ("llm", "audio_encoder", "video_encoder")  # sections of the configuration

Precisions = dict[str, str]
"""By section."""


def settle_precision(config: RunConfig, console: Console) -> RunConfig:
    """The configuration with precisions that all ranks agree on; every rank of the world calls it, if there is one.

    A run that is resumed keeps those that it began with, whatever machine it goes on: its losses depend on them.
    """
    open_ones = [section for section, precision in _precisions(config).items() if precision == "auto"]
    if not open_ones:
        return config
    alone = not dist.is_initialized()
    begun = _begun_with(config) if alone or dist.get_rank() == 0 else {}
    found = [(fast_precision(), begun)]
    if not alone:
        found *= dist.get_world_size()
        dist.all_gather_object(found, found[0])
    begun, slow = found[0][1], [rank for rank, (fast, _) in enumerate(found) if fast == "fp32"]
    settled: Precisions = {}
    reasons: dict[str, list[str]] = {}
    for section in open_ones:
        if begun.get(section, "auto") != "auto":
            settled[section], reason = begun[section], "as this run began"
        elif slow:
            settled[section], reason = "fp32", f"the device of rank {slow[0]} has no bf16 products in hardware"
        else:
            settled[section], reason = "bf16", "in hardware on every rank's device"
        reasons.setdefault(f"{settled[section]}, {reason}", []).append(f"{section}.precision=auto")
    for outcome, keys in reasons.items():
        console.print(f"{' '.join(keys)}: {outcome}", highlight=False)
    sections = {
        section: dataclasses.replace(getattr(config, section), precision=precision)
        for section, precision in settled.items()
    }
    return dataclasses.replace(config, **sections)


def _precisions(config: RunConfig) -> Precisions:
    return {section: getattr(config, section).precision for section in FROZEN}


def _begun_with(config: RunConfig) -> Precisions:
    """Those of the run that this one continues; none for a new run."""
    file = Path(config.output_dir) / CONFIG
    if not config.training.resume or newest_checkpoint(config.output_dir) is None or not file.is_file():
        return {}
    return _precisions(load_saved_config(file))
