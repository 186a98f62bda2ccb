"""Steps of a small random model on the layout of a job, timed; what a rank of `ForkedRunner` runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mome_dist.config.derived import layout_of
from mome_dist.config.schema import RunConfig
from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.speech.lora import LoRATerms
from mome_dist.training.step import forward_backward
from mome_dist.tuning.outcome import TimedStep
from mome_dist.verification.encoders import RankEncoders, trained_encoders
from mome_dist.verification.probe import Probe, small_modules

TIMEOUT_SECONDS = 60


def timed_steps(config: RunConfig, llm: Path, settings: Mapping[str, Any], steps: int) -> list[TimedStep]:
    """Train a few steps on this rank.

    Args:
        llm: directory of a small random LLM.
        settings: a DeepSpeed configuration.
    """
    config = small_modules(config, llm)
    layout = layout_of(config, int(os.environ["WORLD_SIZE"]))
    dispatch = {"auto": "gather" if layout.ep > 1 else "local"}.get(config.mome.dispatch, config.mome.dispatch)
    probe, timed = Probe(config, steps, current_device()), []
    with parallel_world(layout, config.seed, TIMEOUT_SECONDS) as at:
        encoders = trained_encoders(config, probe.widths) if at.pp == 0 else {}
        terms = LoRATerms.of({stream: encoder.to(probe.device) for stream, encoder in encoders.items()})
        model = build_distributed(config, layout, probe.widths, dispatch, probe.device, lora=terms).train()
        online = RankEncoders(encoders, probe.device)
        engine = Engine(model, config.optimizer, settings, layout.sequence_parallel)
        for number in range(steps):
            step = probe.step(number, at.dp, layout)
            dist.barrier()
            began = time.perf_counter()
            step = online.load(step)
            with engine.accumulate():
                loss = forward_backward(model, step).loss
                online.backward()
            engine.step(config.optimizer.learning_rate)
            elapsed = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            timed.append(TimedStep(float(elapsed), loss, engine.gradient_norm))
    return timed
