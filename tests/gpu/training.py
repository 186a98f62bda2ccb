"""A small model that trains on the device in a world of one rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.model.distributed import DistributedMoME
from mome_dist.parallel.layout import Layout
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe, wake
from mome_dist.verification.run import optimizer_of

ONE = Layout.for_world(1)
Arrays = dict[str, np.ndarray]


class Trainee:
    """Model and engine as they are before the first step; needs a world of one rank."""

    def __init__(self, probe: Probe, device: torch.device, dispatch: str) -> None:
        self.probe = dataclasses.replace(probe, device=device)
        self.settings = optimizer_of(probe, "adamw")
        self.model: DistributedMoME = build_distributed(probe.config, ONE, probe.widths, dispatch, device).train()
        wake(self.model.trained_parts(), probe.config.seed)

    def start(self, zero: int) -> None:
        """Make the engine, of the weights that the model has now."""
        self.engine = Engine(self.model, self.settings, {"zero_optimization": {"stage": zero}})

    def gradients(self, number: int) -> Arrays:
        """The loss and every gradient of a step's batch; nothing is stepped."""
        with self.engine.accumulate():
            loss = forward_backward(self.model, self.probe.step(number, 0, ONE)).loss
        found = {"loss": np.array(loss)}
        for name, parameter in self.engine_parameters().items():
            found[name] = self.engine.gradient(parameter).detach().cpu().numpy().copy()
        self.engine.discard()
        return found

    def step(self, number: int) -> float:
        """Train on a step's batch; the loss before it."""
        with self.engine.accumulate():
            loss = forward_backward(self.model, self.probe.step(number, 0, ONE)).loss
        self.engine.step(self.settings.learning_rate)
        return loss

    def engine_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What trains, by name."""
        return dict(self.model.trainable_modules().named_parameters())

    def state(self) -> Arrays:
        """Weights and both moments of the optimiser."""
        names: dict[torch.Tensor, str] = {held: name for name, held in self.engine_parameters().items()}
        found = {name: parameter.detach().cpu().numpy().copy() for parameter, name in names.items()}
        for moment in self.engine.moment_names:
            for parameter, value in self.engine.moments.whole(moment):
                found[f"{moment}/{names[parameter]}"] = value.detach().cpu().numpy().copy()
        return found


def different(mine: Arrays, theirs: Arrays) -> list[str]:
    """Names whose bits differ."""
    assert mine.keys() == theirs.keys()
    return [name for name, value in mine.items() if value.tobytes() != theirs[name].tobytes()]
