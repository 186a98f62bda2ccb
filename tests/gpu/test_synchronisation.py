"""How often the host waits for the device in a MoME layer and in a training step: no more often than it did."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.step import forward_backward
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import optimizer_of
from tests.gpu.conftest import Record
from tests.gpu.counting import waits
from tests.gpu.layers import DISPATCHES, SIZES, clear_tokens, parallel_form
from tests.gpu.worlds import run_alone
from tests.packed import counted, one_view

pytestmark = pytest.mark.gpu

# Counted at the time of writing, on a CPU; whoever needs fewer lowers them.
MOST_IN_A_LAYER = {"local": 0, "gather": 0, "alltoall": 1}
# Of a world of one rank that trains four layers on two microbatches in three views, by ZeRO stage.
MOST_IN_A_STEP = {0: 5, 1: 9, 2: 9}  # of them 2 of the schedule and, under ZeRO, 5 of DeepSpeed


def _layers(device: torch.device) -> dict[str, Counter[str]]:
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        return {dispatch: _layer(device, dispatch) for dispatch in DISPATCHES}


def _layer(device: torch.device, dispatch: str) -> Counter[str]:
    module = parallel_form(SIZES[device.type], dispatch, device)
    hidden_TH = clear_tokens(SIZES[device.type]).to(device).requires_grad_()

    context = one_view(len(hidden_TH), device)

    def run() -> None:
        output_TH, _ = counted(module, hidden_TH, context)
        output_TH.backward(torch.ones_like(output_TH))

    run()  # the first time allocates
    return waits(device, run)


def _step(device: torch.device, probe: Probe, zero: int) -> Counter[str]:
    layout, probe = Layout.for_world(1), dataclasses.replace(probe, device=device)
    settings = optimizer_of(probe, "adamw")
    with parallel_world(layout, probe.config.seed, timeout_seconds=60):
        model = build_distributed(probe.config, layout, probe.widths, "local", device).train()
        engine = Engine(model, settings, {"zero_optimization": {"stage": zero}})
        step = probe.step(0, 0, layout)
        assert len(step.microbatches) == 2 and len(step.views) == 3

        def run() -> None:
            with engine.accumulate():
                forward_backward(model, step)
            engine.step(settings.learning_rate)

        run()
        return waits(device, run)


def _nothing(device: torch.device) -> Counter[str]:
    return waits(device, lambda: torch.ones(3, device=device).sum())


def _every_kind(device: torch.device) -> Counter[str]:
    values = torch.arange(4.0, device=device)

    def run() -> None:
        reads: list[Callable[[], object]] = [
            values.sum().item,
            values.tolist,
            values.nonzero,
            lambda: float(values[0]),
            lambda: bool(values[0] == 0),
            lambda: values[values > 1],
            lambda: torch.tensor([1.0, 2.0], device=device),
        ]
        for read in reads:
            read()

    return waits(device, run)


def test_the_count_knows_what_waits_and_what_does_not(device: torch.device) -> None:
    assert not run_alone(device, _nothing, device)
    found = run_alone(device, _every_kind, device)
    assert found.total() >= 7, found


def test_a_layer(device: torch.device, record: Record) -> None:
    found = run_alone(device, _layers, device)
    record(waits_of_a_layer=found)
    for dispatch, counts in found.items():
        assert counts.total() <= MOST_IN_A_LAYER[dispatch], (dispatch, counts)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_step(device: torch.device, probe: Probe, zero: int, record: Record) -> None:
    found = run_alone(device, _step, device, probe, zero)
    record(**{f"waits_of_a_step_zero{zero}": found})
    assert found.total() <= MOST_IN_A_STEP[zero], found
