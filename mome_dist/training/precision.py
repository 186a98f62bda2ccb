"""Settle ``llm.precision=auto`` for a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from mome_dist.checkpoint.format import CONFIG, newest_checkpoint
from mome_dist.config import RunConfig
from mome_dist.config.load import load_saved_config
from mome_dist.llm.precision import fast_precision


def settle_precision(config: RunConfig, console: Console) -> RunConfig:
    """The configuration with a precision that all ranks agree on; every rank of the world calls it.

    A run that is resumed keeps the one it began with, whatever machine it goes on: its losses depend on it.
    """
    if config.llm.precision != "auto":
        return config
    begun = _begun_with(config) if dist.get_rank() == 0 else None
    found: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(found, (fast_precision(), begun))
    begun, slow = found[0][1], [rank for rank, (fast, _) in enumerate(found) if fast == "fp32"]
    if begun is not None:
        precision, reason = begun, "as this run began"
    elif slow:
        precision, reason = "fp32", f"the device of rank {slow[0]} has no bf16 products in hardware"
    else:
        precision, reason = "bf16", "in hardware on every rank's device"
    console.print(f"llm.precision=auto: {precision}, {reason}", highlight=False)
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, precision=precision))


def _begun_with(config: RunConfig) -> str | None:
    """The precision of the run that this one continues; None for a new run."""
    file = Path(config.output_dir) / CONFIG
    if not config.training.resume or newest_checkpoint(config.output_dir) is None or not file.is_file():
        return None
    return load_saved_config(file).llm.precision
