"""The Triton kernels of a MoME layer in Triton's interpreter, against PyTorch's form and autograd."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.routing import Routing, route
from mome_dist.moe.triton import experts
from mome_dist.moe.triton.experts import LayerForm, launch_backward, launch_forward, runs_as_one_kernel
from tests import compile_kernels
from tests.kernel_forms import CUT, IN_THE_NORM, Layer, errors

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU, tests/gpu/test_kernel.py looks at the kernels"
)

SETTINGS: list[dict[str, Any]] = [
    {"score": score, "renormalize": renormalize, "biased": biased}
    for score, renormalize, biased in itertools.product(("softmax", "sigmoid"), (True, False), (False, True))
]
SHAPES = {
    "the paper's": Layer(routed=23, units=12, top_k=4),
    "one token": Layer(views=(1,), dead=0),
    "257 tokens in three views": Layer(routed=5, views=(100, 57, 100), dead=0, shared=2),
    "one expert of one unit": Layer(routed=1, units=1, top_k=1, shared=0),
    "every expert chosen, none shared": Layer(routed=5, top_k=5, shared=0),
    "units in two steps": Layer(routed=3, units=17, dead=1),
    "a view without a token": Layer(views=(6, 0, 4)),
    "dead tokens alone": Layer(views=(0,), dead=3),
    "a program's row is a token": Layer(routed=70, units=20, top_k=3, views=(3,), dead=0),
}
FP32 = 1e-6  # sums of up to 300 numbers, in another order


@pytest.fixture(autouse=True)
def _unwritten_memory_is_not_a_number() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(map(str, each.values())))
def test_every_router_and_its_gradients(settings: dict[str, Any]) -> None:
    layer = replace(Layer(), **settings)
    for name, error in errors(layer, "cpu").items():
        assert error < FP32, (name, error)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_its_gradients(shape: str) -> None:
    for settings in SETTINGS[:: len(SETTINGS) - 1]:  # a softmax without a bias, and sigmoids with one
        for name, error in errors(replace(SHAPES[shape], **settings), "cpu").items():
            assert error < FP32, (settings, name, error)


@pytest.mark.parametrize("settings", SETTINGS[::3], ids=lambda each: " ".join(map(str, each.values())))
def test_a_layer_in_bf16_differs_by_its_roundings(settings: dict[str, Any]) -> None:
    layer = Layer(routed=9, units=5, top_k=3, views=(40, 31), hidden=64, dtype=torch.bfloat16)
    for name, error in errors(replace(layer, **settings), "cpu").items():
        # Sums of probabilities are fp32 in both.
        assert error < (FP32 if name == "sums" else IN_THE_NORM * CUT), (name, error)


class _Stage:
    """What goes into the kernels, and what comes out."""

    def __init__(self, layer: Layer, logits_TE: Tensor | None = None) -> None:
        form, context = layer.form, layer.context
        tokens = context.tokens
        self.layer, self.form, self.context, self.bias_E = layer, form, context, layer.choice_bias()
        self.logits_TE = layer.random(tokens, form.routed, seed=1) if logits_TE is None else logits_TE
        units = form.experts * form.units
        self.narrow_TN = layer.random(tokens, units, seed=2).to(layer.dtype)
        self.biases = [layer.random(form.routed, form.units, seed=3), layer.random(form.shared, form.units, seed=4)]
        self.value_TN = self.narrow_TN.clone()
        self.inputs_TM, self.experts_TK, self.partial_PVX = launch_forward(
            form, self.logits_TE, self.value_TN, self.biases, self.bias_E, context.alive_N, context.members_VN
        )
        self.grad_inputs_TM = layer.random(*self.inputs_TM.shape, seed=5).to(layer.dtype)
        self.grad_sums_VX: Tensor | None = layer.random(*self.partial_PVX.shape[1:], seed=6)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        return launch_backward(
            self.form,
            self.logits_TE,
            self.value_TN,
            self.experts_TK,
            self.context.alive_N,
            self.context.members_VN,
            self.grad_inputs_TM,
            self.grad_sums_VX,
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Routing]:
        """Inputs of the up-projection, sums, gradients of units and logits, and routes: PyTorch in fp32, from what the
        kernel took GELU of."""
        value_TN, logits_TE = self.value_TN.float().requires_grad_(), self.logits_TE.clone().requires_grad_()
        layer = self.layer
        routing = route(
            logits_TE, layer.top_k, layer.renormalize, self.context.alive_N, score=layer.score, bias_E=self.bias_E
        )
        gates_TX = F.pad(routing.gates_TE(), (0, self.form.shared), value=1.0)
        inputs_TM = torch.cat([F.gelu(value_TN) * gates_TX.repeat_interleave(layer.units, dim=1), gates_TX], dim=1)
        sums_VX = routing.balance_sums(self.context.members_VN, True)
        of_value_TN, of_logits_TE = torch.autograd.grad(
            [inputs_TM, sums_VX], [value_TN, logits_TE], [self.grad_inputs_TM.float(), self.grad_sums_VX]
        )
        return inputs_TM.detach(), sums_VX.detach(), of_value_TN, of_logits_TE, routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(map(str, each.values())))
def test_between_the_products_everything_is_fp32_and_rounded_once(settings: dict[str, Any], dtype: torch.dtype) -> None:
    stage = _Stage(replace(Layer(routed=7, units=5, top_k=3), dtype=dtype, **settings))
    once: dict[str, Any] = {"rtol": 0 if dtype is torch.float32 else CUT, "atol": 1e-6}
    biases_N = torch.cat(stage.biases).flatten()
    torch.testing.assert_close(stage.value_TN.float(), stage.narrow_TN.float() + biases_N, **once)
    inputs_TM, sums_VX, grad_value_TN, grad_logits_TE, routing = stage.expected()
    assert stage.experts_TK.equal(routing.experts_TK)
    torch.testing.assert_close(stage.inputs_TM.float(), inputs_TM, **once)
    torch.testing.assert_close(stage.partial_PVX.sum(dim=0), sums_VX, rtol=1e-6, atol=1e-6)
    again_TM, grad_narrow_TN, of_logits_TE = stage.backward()
    assert again_TM.equal(stage.inputs_TM)
    torch.testing.assert_close(grad_narrow_TN.float(), grad_value_TN, **once)
    torch.testing.assert_close(of_logits_TE, grad_logits_TE, rtol=1e-6, atol=5e-6)  # some are of the order of ten
    gates_TX = stage.inputs_TM[:, stage.form.experts * stage.form.units :].float()
    assert not gates_TX[sum(stage.layer.views) :, : stage.form.routed].any(), "of a dead token"
    assert gates_TX[:, stage.form.routed :].eq(1).all(), "of a shared expert"
    if stage.bias_E is not None:
        assert not gates_TX[:, 1].any(), "of an expert without a token"


def test_sums_are_of_each_program_and_the_bits_are_the_same_in_every_repeat() -> None:
    layer = Layer(views=(60, 70))
    first, second = _Stage(layer), _Stage(layer)
    blocks = layer.form.blocks()
    assert len(first.partial_PVX) == -(-133 // blocks["rows"]) > 1
    for ours, theirs in zip(first.backward(), second.backward(), strict=True):
        assert ours.equal(theirs)
    assert first.inputs_TM.equal(second.inputs_TM) and first.partial_PVX.equal(second.partial_PVX)
    rows = slice(blocks["rows"], 2 * blocks["rows"])
    members_VT, probs_TE = first.context.members_VN[:, rows], first.logits_TE[rows].softmax(dim=1)
    torch.testing.assert_close(first.partial_PVX[1, :, :-1], members_VT @ probs_TE)


def test_equal_scores_go_by_the_number_of_the_expert() -> None:
    """`torch.topk` promises nothing; a stable sort does."""
    logits_TE = torch.randint(-1, 2, (17, 6), generator=torch.Generator().manual_seed(0)).float()
    logits_TE[0] = 0
    stage = _Stage(Layer(top_k=4), logits_TE)
    assert stage.experts_TK.equal(logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :4])
    assert stage.experts_TK[0].tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
def test_what_is_not_a_number_stays_in_its_row_and_is_seen() -> None:
    logits_TE = Layer().random(17, 6, seed=1)
    logits_TE[3, 2], logits_TE[5, :5], logits_TE[7, 4] = torch.nan, -torch.inf, torch.inf
    stage = _Stage(Layer(), logits_TE)
    expected_TE = route(logits_TE, 2, True).gates_TE()
    gates_TE = stage.inputs_TM[:, 7 * 3 : 7 * 3 + 6]
    seen_T = torch.tensor([row not in (3, 7) for row in range(14)])
    assert gates_TE[:14][~seen_T].isnan().any(dim=1).all() and expected_TE[:14][~seen_T].isnan().any(dim=1).all()
    torch.testing.assert_close(gates_TE[:14][seen_T], expected_TE[:14][seen_T])
    assert stage.experts_TK[3].tolist() == [2, int(logits_TE[3].nan_to_num(-9).argmax())]
    assert stage.experts_TK[5].tolist() == [5, 0]
    assert 0 <= int(stage.experts_TK.min()) <= int(stage.experts_TK.max()) < 6


def test_without_a_loss_there_is_nothing_to_add() -> None:
    stage = _Stage(Layer())
    assert stage.grad_sums_VX is not None
    stage.grad_sums_VX = torch.zeros_like(stage.grad_sums_VX)
    expected = stage.backward()
    stage.grad_sums_VX = None
    assert all(ours.equal(theirs) for ours, theirs in zip(stage.backward(), expected, strict=True))


def test_the_kernels_are_for_cuda_and_shapes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(device: str, dtype: torch.dtype, count: int) -> bool:
        like: Any = torch.empty(0, dtype=dtype, device="meta")
        return runs_as_one_kernel(type("Like", (), {"device": torch.device(device), "dtype": like.dtype})(), count)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert taken("cuda", torch.bfloat16, 24) and taken("cuda", torch.float32, 256)
    assert not taken("cpu", torch.bfloat16, 24)
    assert not taken("cuda", torch.float16, 24) and not taken("cuda", torch.bfloat16, 257)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert not taken("cuda", torch.bfloat16, 24)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(experts, "_has_triton", lambda: False)
    assert not taken("cuda", torch.bfloat16, 24)


def test_blocks_are_powers_of_two_that_cover_the_layer() -> None:
    for count, units in itertools.product((1, 2, 24, 33, 256), (1, 3, 12, 16, 128)):
        blocks = LayerForm(count, 0, units, 1, False, True).blocks()
        assert all(size & (size - 1) == 0 for size in blocks.values())
        assert count <= blocks["columns"] < 2 * count or count == 1
        assert blocks["columns"] * blocks["step"] * blocks["rows"] <= 2048


def test_machine_code_is_made_of_the_kernels_without_a_gpu() -> None:
    """For what the interpreter cannot see: types, and what fits into the registers of a thread."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, compile_kernels.__file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" spills nothing") == 2 * len(compile_kernels.CASES), done.stdout
