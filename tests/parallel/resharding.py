"""What the tests of resharding run inside forked worlds: a small model that trains, saves and loads at any layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mome_dist.checkpoint.format import CheckpointReader
from mome_dist.checkpoint.save import save_checkpoint
from mome_dist.config import RunConfig
from mome_dist.parallel.build import build_distributed
from mome_dist.parallel.initialize import current_device, parallel_world
from mome_dist.parallel.layout import Coordinates, Layout
from mome_dist.parallel.model import DistributedMoME
from mome_dist.training.balance import update_router_biases
from mome_dist.training.engine import Engine, learning_rate
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe, wake

STEPS = 2  # before the checkpoint
TAG = "saved"


def _build(probe: Probe, layout: Layout, zero: int, scratch: Path) -> tuple[DistributedMoME, Engine]:
    deepspeed_file = scratch / f"zero{zero}-{dist.get_rank()}.json"
    deepspeed_file.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    model = build_distributed(probe.config, layout, probe.widths, "alltoall", current_device()).train()
    experts = ((g.name, g.index, p) for g, p in model.named_trainables() if ".routed." in g.name or ".shared." in g.name)
    wake(experts, probe.config.seed)
    return model, Engine(model.trainable_modules(), probe.config.optimizer, deepspeed_file, layout.sequence_parallel)


def _step(probe: Probe, layout: Layout, at: Coordinates, model: DistributedMoME, engine: Engine, number: int) -> float:
    step = probe.step(number, at.dp, layout)
    with engine.accumulate():
        loss = forward_backward(model, step).loss
    engine.step(learning_rate(probe.config.optimizer, number, probe.config.training.steps))
    update_router_biases(model)
    return loss


def train_and_save(probe: Probe, layout: Layout, zero: int, folder: Path, native: bool) -> list[float]:
    """Train `STEPS` steps, save ``folder/checkpoints`` (and the engine's own ``folder/native``), train one more.

    Returns:
        The losses of all steps.
    """
    with parallel_world(layout, probe.config.seed, 60) as at:
        model, engine = _build(probe, layout, zero, folder)
        losses = [_step(probe, layout, at, model, engine, number) for number in range(STEPS)]
        save_checkpoint(folder, STEPS, model, engine, probe.config, layout, {"llm": "0" * 64})
        if native:
            engine.deepspeed.save_checkpoint(str(folder / "native"), tag=TAG)
        return [*losses, _step(probe, layout, at, model, engine, STEPS)]
