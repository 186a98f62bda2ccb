"""The Triton kernels of a MoME layer against PyTorch's form on the same device: outputs, routes and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mome_dist.moe.dispatch import gather
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.verification.compare import TOLERANCE
from tests.gpu.conftest import Record
from tests.gpu.layers import SIZES, clear_tokens, named_parts, parallel_form
from tests.gpu.worlds import run_alone
from tests.kernel_forms import CUT, IN_THE_NORM, ROUNDED, Layer, errors
from tests.packed import counted, one_view

pytestmark = pytest.mark.gpu

# On a GPU, as `tests.gpu.layers.SIZES`, in four views.
LAYERS = {
    "cpu": Layer(routed=7, units=5, top_k=3, views=(30, 10, 11), hidden=64),
    "cuda": Layer(routed=23, units=12, top_k=4, views=(401, 101, 301, 201), hidden=3072),
}
ROUTERS: tuple[dict[str, Any], ...] = (
    {"score": "softmax", "renormalize": True, "biased": False},
    {"score": "softmax", "renormalize": False, "biased": True},
    {"score": "sigmoid", "renormalize": True, "biased": True},
    {"score": "sigmoid", "renormalize": False, "biased": False},
)
# In Triton's interpreter, which is where there is no GPU, results are cut off.
BF16 = {"cpu": IN_THE_NORM * CUT, "cuda": IN_THE_NORM * ROUNDED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_compute_what_pytorch_does(device: torch.device, record: Record, dtype: torch.dtype) -> None:
    for settings in ROUTERS:
        found = errors(replace(LAYERS[device.type], dtype=dtype, **settings), device)
        name = max(found, key=lambda name: found[name])
        record(**{f"{dtype} {settings}": {name: found[name]}})
        assert found[name] < (TOLERANCE if dtype is torch.float32 else BF16[device.type]), (settings, found)


def _layer(size: str, device: torch.device) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Outputs and gradients of a layer of training by the kernels and in PyTorch's form, and the routes' type."""
    kept, found, routes = gather.runs_as_one_kernel, [], []
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=60):
        for by_kernel in (True, False):
            module = parallel_form(SIZES[size], "local", device, balance_loss=0.1, z_loss=0.01)
            hidden_TH = clear_tokens(SIZES[size]).to(device).requires_grad_()
            if device.type == "cpu" or not by_kernel:  # on a GPU, the kernels are what is chosen
                gather.runs_as_one_kernel = lambda *_, answer=by_kernel: answer
            try:
                output_TH, _ = counted(module, hidden_TH, one_view(len(hidden_TH), device))
            finally:
                gather.runs_as_one_kernel = kept
            output_TH.square().mean().backward()
            gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            tensors = {"output": output_TH, "input": hidden_TH.grad, **named_parts(module, gradients)}
            found.append(
                {name: each.detach().cpu().numpy().copy() for name, each in tensors.items() if each is not None}
            )
            routes.append(type(module.deepspeed_moe.routing).__name__)
    return found, routes


def test_a_layer_of_training_runs_them(device: torch.device, record: Record) -> None:
    (ours, theirs), routes = run_alone(device, _layer, device.type, device)
    assert routes == ["KernelRouting", "Routing"]
    assert ours.keys() == theirs.keys()
    worst = {name: float(np.abs(ours[name] - each).max() / np.abs(each).max()) for name, each in theirs.items()}
    record(layer=max(worst.values()))
    assert max(worst.values()) < TOLERANCE, worst
