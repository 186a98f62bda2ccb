"""Packed experts against the form that trains, and that no pack outlives the weights it was made from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe import packed
from mome_dist.moe.local import LocalMoME
from mome_dist.moe.packed import BIAS_INPUT, FEW_TOKENS
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing, choose_experts, route

HIDDEN, EXPERTS = 48, 6
TOKENS = (1, 2, FEW_TOKENS, FEW_TOKENS + 1)


def _module(shared: int = 1, seed: int = 1, **router: Any) -> LocalMoME:
    module = LocalMoME(HIDDEN, EXPERTS, 2, shared_experts=shared, bottleneck=3, router=RouterSpec(**router))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(0, 0.3, generator=generator)
    return module.eval()


def _hidden(tokens: int) -> Tensor:
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


def _as_trained(module: LocalMoME, hidden: Tensor, base: Tensor | None = None) -> Tensor:
    """What the form with gradients gives."""
    with torch.enable_grad():
        return module(hidden, base).detach()


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    """Up to an error of 1e-6 of the largest value: sums of another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


ROUTERS: list[dict[str, Any]] = [
    {"renormalize": renormalize, "score": score, "bias_rate": rate}
    for renormalize in (True, False)
    for score in ("softmax", "sigmoid")
    for rate in (0.0, 0.1)
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shared", [0, 1, 2])
@torch.no_grad()
def test_the_packed_form_computes_what_is_trained(tokens: int, shared: int) -> None:
    for router in ROUTERS:
        module, hidden = _module(shared, **router), _hidden(tokens)
        base = hidden.flip(1) * 2
        _assert_equal(module(hidden, base), _as_trained(module, hidden, base))
        _assert_equal(module(hidden), _as_trained(module, hidden))


@pytest.mark.parametrize("tokens", TOKENS)
@torch.no_grad()
def test_in_bf16_experts_are_those_of_the_fp32_router(tokens: int) -> None:
    """Errors are those of three roundings to eight bits; another expert would be an error of the size of the output."""
    module, hidden = _module(), _hidden(tokens).bfloat16()
    seen: list[Routing] = []
    module.observer = seen.append
    output = module(hidden)
    assert output.dtype is torch.bfloat16
    expected = _as_trained(module, hidden.float())
    packed, trained = seen
    assert packed.logits_TE.dtype is torch.float32
    torch.testing.assert_close(packed.logits_TE, trained.logits_TE, rtol=1e-6, atol=1e-6)
    assert torch.equal(packed.experts_TK, trained.experts_TK)
    assert (output - expected).abs().max() < 3 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_lets_the_input_of_a_bias_pass(dtype: torch.dtype) -> None:
    """PyTorch has several forms of it: for one number and for many, side by side and apart."""
    for count in (1, 7, 64, 5000):
        spread = torch.full((count, 2), BIAS_INPUT, dtype=dtype)
        for numbers in (spread, spread[:, 0]):
            assert F.gelu(numbers).eq(BIAS_INPUT).all()


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_the_short_choice_is_the_routers(router: dict[str, Any]) -> None:
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-0.3, 0.3, EXPERTS) if router["bias_rate"] else None
    whole = route(logits, 3, router["renormalize"], score=router["score"], bias_E=bias)
    experts, gates = choose_experts(logits, 3, router["renormalize"], score=router["score"], bias_E=bias)
    assert torch.equal(experts, whole.experts_TK)
    torch.testing.assert_close(gates, whole.gates_TK, rtol=1e-6, atol=0)


def _in_place(module: LocalMoME) -> None:
    for parameter in module.parameters():
        parameter.mul_(1.5)


def _one_element(module: LocalMoME) -> None:
    assert module.shared is not None
    module.shared.get_parameter("up_bias")[0, 3] += 1


def _optimizer(module: LocalMoME) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def _other_memory(module: LocalMoME) -> None:
    """Twice, so that the first memory is free to be given out again."""
    for _ in range(2):
        for parameter in module.parameters():
            parameter.data = parameter.data + 0.25


def _other_parameters(module: LocalMoME) -> None:
    module.routed.down_weight = nn.Parameter(module.routed.get_parameter("down_weight") * 2)
    module.router.weight = nn.Parameter(module.router.get_parameter("weight").flip(0))


def _there_and_back(module: LocalMoME) -> None:
    module.to(torch.bfloat16).to(torch.float32)


def _behind_autograd(module: LocalMoME) -> None:
    """What writes past version counters says so by `eval`."""
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    module.eval()


def _inference_mode(module: LocalMoME) -> None:
    """Tensors whose writes nothing counts."""
    with torch.inference_mode():
        module.routed.up_weight = nn.Parameter(module.routed.get_parameter("up_weight") * 2, requires_grad=False)
        module(_hidden(1))
        module.routed.get_parameter("up_weight").mul_(2)


CHANGES = [
    _in_place,
    _one_element,
    _optimizer,
    lambda module: module.load_state_dict(_module(seed=5).state_dict()),
    lambda module: module.load_state_dict(_module(seed=5).state_dict(), assign=True),
    lambda module: module.initialize("mome.0", 3),
    _other_memory,
    _other_parameters,
    _there_and_back,
    _behind_autograd,
    _inference_mode,
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_no_pack_outlives_its_weights(change: Callable[[LocalMoME], Any], tokens: int) -> None:
    module, hidden = _module(), _hidden(tokens)
    before = module(hidden)
    change(module)
    after = module(hidden)
    assert not torch.equal(after, before), "the change changes nothing: the test cannot tell"
    _assert_equal(after, _as_trained(module, hidden))


@torch.no_grad()
def test_packing_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    packing = packed.PackedExperts

    def counted(*arguments: Any) -> Any:
        made.append(arguments[-1])
        return packing(*arguments)

    monkeypatch.setattr(packed, "PackedExperts", counted)
    module = _module()
    for tokens in (*TOKENS, 1, 1):
        module(_hidden(tokens))
    assert made == [torch.float32]
    twin = copy.deepcopy(module)
    twin(_hidden(1))
    twin.train()(_hidden(1))
    assert twin._pack is None, "who trains does not pay for the memory"
    module(_hidden(1).bfloat16())
    assert made == [torch.float32, torch.float32, torch.bfloat16]


def test_gradients_flow_in_eval_mode() -> None:
    module, hidden = _module(), _hidden(3).requires_grad_()
    module(hidden).sum().backward()
    assert hidden.grad is not None and all(parameter.grad is not None for parameter in module.parameters())
    assert module.last_routing is not None
    with torch.no_grad():
        module(hidden)
    assert module.last_routing is None, "no loss may take an older pass's routing for this one's"
