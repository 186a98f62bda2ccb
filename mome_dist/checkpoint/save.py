"""Writing a checkpoint: each rank its own part, then one rename makes it visible.

Parts are written into a hidden directory beside the final one; after all ranks are done, rank 0 writes the index,
flushes everything to disk, renames the directory and moves ``latest``. A crash at any moment leaves the previous
checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from mome_dist.checkpoint.format import CONFIG, FORMAT, INDEX, LATEST, Part, describe_part, merge_parts
from mome_dist.config import RunConfig, save_config
from mome_dist.files import fsync, sha256_of, write_text
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.model import DistributedMoME, rank_writes
from mome_dist.training.engine import Engine


def save_checkpoint(
    run: Path,
    step: int,
    model: DistributedMoME,
    engine: Engine,
    config: RunConfig,
    layout: Layout,
    frozen: dict[str, str],
) -> Path:
    """Write ``run/checkpoints/step-NNNNNN``; every rank calls it.

    Args:
        step: optimiser steps done.
        frozen: fingerprints of the frozen parts, by name.

    Returns:
        The published directory.
    """
    folder = run / "checkpoints"
    final, aside = folder / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    _write_part(aside, rank, _collect(model, engine))
    dist.barrier()
    if rank == 0:
        descriptions = [json.loads(path.read_text()) for path in sorted(aside.glob("part-*.json"))]
        for path in aside.glob("part-*.json"):
            path.unlink()
        save_config(config, aside / CONFIG)
        index = {
            "format": FORMAT,
            "step": step,
            "utterances_seen": step * config.data.batch_size,
            "written_by": {"layout": asdict(layout), "zero": engine.zero_stage},
            "versions": {name: version(name) for name in ("mome_dist", "torch", "megatron-core", "deepspeed")},
            "frozen": frozen,
            "files": {name: facts for part in descriptions for name, facts in part["files"].items()},
            "tensors": merge_parts(part["tensors"] for part in descriptions),
        }
        (aside / INDEX).write_text(json.dumps(index, indent=1))
        _publish(aside, final)
        _prune(folder, config.training.keep_checkpoints)
    dist.barrier()
    return final


def _collect(model: DistributedMoME, engine: Engine) -> dict[str, tuple[Tensor, int | None]]:
    """This rank's share: tensors by global name, experts stacked, with the number of the first one.

    Reading the optimiser's moments is collective, so every rank reads all of its own in the same order and then keeps
    what it is the one to write.
    """
    single: dict[str, Tensor] = {}
    stacked: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, bias in model.router_biases().items():
        if rank_writes(bias):
            single[f"model/{key}"] = bias
    for name, parameter in model.named_trainables():
        values = {f"model/{name.name}": parameter.detach()}
        values |= {f"optimizer/{key}/{name.name}": engine.moment(parameter, key) for key in engine.moment_names}
        if not rank_writes(parameter):
            continue
        for key, value in values.items():
            if name.index is None:
                single[key] = value
            else:
                stacked[key][name.index] = value
    collected: dict[str, tuple[Tensor, int | None]] = {key: (value, None) for key, value in single.items()}
    for key, rows in stacked.items():
        first = min(rows)
        collected[key] = (torch.stack([rows[number] for number in range(first, first + len(rows))]), first)
    return {key: (value.contiguous().cpu(), first) for key, (value, first) in collected.items()}


def _write_part(folder: Path, rank: int, tensors: dict[str, tuple[Tensor, int | None]]) -> None:
    if not tensors:
        return
    path = folder / f"part-{rank:05d}.safetensors"
    save_file({name: tensor for name, (tensor, _) in tensors.items()}, path)
    fsync(path)
    description: dict[str, Any] = {
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}},
        "tensors": {
            name: describe_part(tensor, Part(path.name, first, None if first is None else len(tensor)))
            for name, (tensor, first) in tensors.items()
        },
    }
    path.with_suffix(".json").write_text(json.dumps(description))


def _publish(aside: Path, final: Path) -> None:
    for path in (aside / INDEX, aside / CONFIG, aside):
        fsync(path)
    if final.exists():  # a step that is trained again after a resume from an older checkpoint
        shutil.rmtree(final)
    aside.replace(final)
    write_text(final.parent / LATEST, final.name)
    fsync(final.parent)


def _prune(folder: Path, keep: int) -> None:
    latest = (folder / LATEST).read_text().strip()
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old.name != latest:
            shutil.rmtree(old)
