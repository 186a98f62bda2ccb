"""The same inputs give the same bits on the device, twenty times: of a MoME layer and of a step's gradients."""

from __future__ import annotations

import pytest
import torch

from mome_dist.parallel.initialize import parallel_world
from mome_dist.verification.probe import Probe
from tests.gpu.layers import DISPATCHES, SIZES, clear_tokens, parallel_form, passed
from tests.gpu.training import ONE, Trainee, different
from tests.gpu.worlds import run_alone

pytestmark = pytest.mark.gpu

REPEATS = 20


def _layers(device: torch.device) -> dict[str, list[str]]:
    """What was not always the same, by dispatch and type."""
    with parallel_world(ONE, 0, timeout_seconds=60):
        return {
            f"{dispatch} {dtype}": _changes(device, dispatch, dtype)
            for dispatch in DISPATCHES
            for dtype in (torch.float32, torch.bfloat16)
        }


def _changes(device: torch.device, dispatch: str, dtype: torch.dtype) -> list[str]:
    module = parallel_form(SIZES[device.type], dispatch, device)
    tokens_TH = clear_tokens(SIZES[device.type], dtype).to(device)
    first: dict[str, torch.Tensor] = {}
    changed: set[str] = set()
    for _ in range(REPEATS):
        module.zero_grad()
        hidden_TH = tokens_TH.clone().requires_grad_()
        output_TH = passed(module, hidden_TH)
        output_TH.float().square().mean().backward()
        found = {"output": output_TH.detach(), "input": hidden_TH.grad}
        found |= {name: parameter.grad for name, parameter in module.named_parameters()}
        kept = {name: value for name, value in found.items() if value is not None}
        first = first or {name: value.clone() for name, value in kept.items()}
        assert kept.keys() == first.keys() and len(kept) > 4
        changed |= {name for name, value in kept.items() if not torch.equal(value, first[name])}
    return sorted(changed)


def _step(probe: Probe, device: torch.device, dispatch: str) -> list[str]:
    with parallel_world(ONE, probe.config.seed, timeout_seconds=60):
        trainee = Trainee(probe, device, dispatch)
        trainee.start(zero=0)
        first = trainee.gradients(0)
        assert different(trainee.gradients(1), first) == list(first), "another batch has the same gradients"
        changed = {name for _ in range(REPEATS - 1) for name in different(trainee.gradients(0), first)}
    return sorted(changed)


def test_a_layer_gives_the_same_bits(device: torch.device) -> None:
    found = run_alone(device, _layers, device)
    assert len(found) == 2 * len(DISPATCHES) and not any(found.values()), found


def test_a_step_gives_the_same_bits(device: torch.device, probe: Probe) -> None:
    assert run_alone(device, _step, probe, device, "local") == []
