"""A MoME layer on the device against the one-process form on the CPU, in fp32: outputs and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mome_dist.moe.balance import load_balance_loss, router_z_loss
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.verification.compare import TOLERANCE
from tests.gpu.conftest import Record
from tests.gpu.layers import DISPATCHES, SIZES, clear_tokens, named_parts, one_process_form, parallel_form, passed
from tests.gpu.worlds import run_alone

pytestmark = pytest.mark.gpu

BALANCE, Z_LOSS = 0.1, 0.01
Arrays = dict[str, np.ndarray]


def _expected(size: str) -> Arrays:
    module, hidden_TH = one_process_form(SIZES[size]), clear_tokens(SIZES[size]).requires_grad_()
    output_TH = module(hidden_TH)
    routing = module.last_routing
    assert routing is not None
    tokens = torch.tensor(len(hidden_TH))
    balance = load_balance_loss(routing, routing.selected_TE().sum(dim=0), tokens)
    (output_TH.square().mean() + BALANCE * balance + Z_LOSS * router_z_loss(routing, tokens)).backward()
    found = {"output": output_TH, "input": hidden_TH.grad}
    for name, parameter in module.named_parameters():
        stack, _, kind = name.rpartition(".")
        assert parameter.grad is not None
        if stack == "router":
            found["router"] = parameter.grad
        else:
            found |= {f"{stack}.{number}.{kind}": value for number, value in enumerate(parameter.grad)}
    return _arrays(found)


def _found(size: str, device: torch.device) -> dict[str, Arrays]:
    by_dispatch = {}
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        for dispatch in DISPATCHES:
            module = parallel_form(SIZES[size], dispatch, device, balance_loss=BALANCE, z_loss=Z_LOSS)
            hidden_TH = clear_tokens(SIZES[size]).to(device).requires_grad_()
            output_TH = passed(module, hidden_TH)
            output_TH.square().mean().backward()
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            by_dispatch[dispatch] = _arrays(
                {"output": output_TH, "input": hidden_TH.grad, **named_parts(module, gradients)}
            )
    return by_dispatch


def _arrays(tensors: dict[str, torch.Tensor | None]) -> Arrays:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items() if tensor is not None}


def test_every_dispatch_equals_one_process_on_the_cpu(device: torch.device, record: Record) -> None:
    sizes = SIZES[device.type]
    expected = run_alone(device, _expected, device.type)
    found = run_alone(device, _found, device.type, device)
    assert found.keys() == set(DISPATCHES)
    worst: dict[str, float] = {}
    for dispatch, arrays in found.items():
        assert arrays.keys() == expected.keys() and len(arrays) == 3 + 4 * (sizes.experts + sizes.shared)
        errors = {
            name: float(np.abs(arrays[name] - value).max() / np.abs(value).max()) for name, value in expected.items()
        }
        worst[dispatch] = max(errors.values())
        # Sums of up to 3072 products are within what the bound of layouts leaves room for.
        assert worst[dispatch] < TOLERANCE, (dispatch, max(errors, key=lambda name: errors[name]), worst)
    record(largest_relative_error=worst)
