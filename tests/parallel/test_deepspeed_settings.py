"""Every DeepSpeed setting that acts leaves what is trained alone, and what would not is refused or found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mome_dist.config.schema import OptimizerConfig
from mome_dist.parallel.build import build_distributed
from mome_dist.parallel.initialize import current_device, parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.engine import Engine
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe, wake

STEPS = 9  # each view three times
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, gradient_clipping=0.0)


def _train_each(probe: Probe, all_settings: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Losses of the same training in each of some DeepSpeed settings, one after the other in this rank's world.

    Each step has one view, in turn, so most projectors and rates have no gradient in it.
    """
    config, layout = probe.config, Layout.for_world(2)
    views = probe.views
    losses: list[list[float]] = []
    with parallel_world(layout, config.seed, 60) as at:
        for settings in all_settings:
            model = build_distributed(config, layout, probe.widths, "local", current_device()).train()
            parts = [(p.name, p.index, p.value) for p in model.trained_parts()]
            wake([part for part in parts if ".routed." in part[0] or ".shared." in part[0]], config.seed)
            engine = Engine(model.trainable_modules(), SGD, settings)
            losses.append([])
            for number in range(STEPS):
                step = probe.step(number, at.dp, layout)
                view = views[number % len(views)]
                chosen = [batch for batch in step.microbatches if batch.view == view]
                step = dataclasses.replace(step, microbatches=chosen, views=[view])
                with engine.accumulate():
                    losses[-1].append(forward_backward(model, step).loss)
                engine.step(SGD.learning_rate)
            engine.deepspeed.destroy()
    return losses
