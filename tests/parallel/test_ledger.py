"""The ledger: a run whose parameters do not do what they were declared to do ends with their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.checkpoint import save
from mome_dist.config import load_config
from mome_dist.engine import engine as engine_module
from mome_dist.engine.engine import Engine
from mome_dist.model.distributed import DistributedMoME
from mome_dist.preflight import validate
from mome_dist.training import loop
from mome_dist.training.ledger import checksum
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world


def _left_out_of_the_optimiser() -> None:
    groups = engine_module._parameter_groups

    def shortened(modules: Any) -> list[dict[str, Any]]:
        made = groups(modules)
        router = modules["layer_1"].deepspeed_moe.gate.wg.weight
        for group in made:
            group["params"] = [parameter for parameter in group["params"] if parameter is not router]
        return made

    engine_module._parameter_groups = shortened


def _gradient_lost() -> None:
    accumulate = Engine.accumulate

    @contextmanager
    def losing(self: Engine) -> Iterator[None]:
        with accumulate(self):
            yield
            layer: Any = self._modules["layer_2"]
            layer.deepspeed_moe.gate.wg.weight.grad.zero_()

    Engine.accumulate = losing  # type: ignore[method-assign]


def _put_back_after_each_step() -> None:
    step = Engine.step

    def without_one(self: Engine, rate: float) -> None:
        layer: Any = self._modules["layer_0"]
        weight = layer.shared.down_weight
        before = weight.detach().clone()
        step(self, rate)
        with torch.no_grad():
            weight.copy_(before)

    Engine.step = without_one  # type: ignore[method-assign]


def _frozen_weight_moves() -> None:
    forward_backward = loop.forward_backward

    def nudging(model: DistributedMoME, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.parts()[0].llm.decoder.layers[1].mlp.linear_fc2.weight[0, 0] += 1e-3
        return forward_backward(model, *args, **kwargs)

    loop.forward_backward = nudging


def _missing_from_the_checkpoint() -> None:
    collect = save.collect

    def partial(*args: Any) -> Any:
        return {name: value for name, value in collect(*args).items() if name != "model/mome.3.shared.up_bias"}

    save.collect = partial  # type: ignore[assignment]


def _train(overrides: list[str], cache: Path, plant: Callable[[], None]) -> None:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    plant()
    config = load_config(overrides)
    loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_left_out_of_the_optimiser, "mome.1.router_weight is in 0 optimiser groups instead of one"),
        (_gradient_lost, "no gradient of mome.2.router_weight reached the optimiser in 6 steps"),
        (_put_back_after_each_step, "mome.0.shared.down_weight did not move in 6 steps"),
        (_frozen_weight_moves, "frozen parameter chunk 0: decoder.layers.1.mlp.linear_fc2.weight changed"),
        (_missing_from_the_checkpoint, "mome.3.shared.up_bias trains, but is not in step-000007"),
    ],
)
def test_a_violation_stops_the_run_and_names_the_parameter(
    lab: Lab, tmp_path: Path, plant: Callable[[], None], message: str
) -> None:
    overrides = lab.overrides(tmp_path, "parallel.ep=2", "training.steps=7", "mome.balance_loss=0.01")
    with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
        run_world(_train, 2, overrides, lab.cache, plant)


def test_a_checksum_sees_every_bit_and_the_order() -> None:
    tensor = torch.randn(3, 7, dtype=torch.bfloat16)
    other = tensor.clone()
    other.view(torch.int16)[2, 3] ^= 1
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(other)
    assert checksum(tensor) != checksum(tensor.flip(0))
