"""Operations with a backward pass of their own against the same sums written out for autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe import ragged
from mome_dist.moe.columns import unpack
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.fused_bottleneck import ExpertWeights, dense_experts
from mome_dist.moe.ragged import Groups, Placement, by_expert, lay_out, ragged_experts
from mome_dist.moe.routed import RoutedExperts

TOKENS, HIDDEN, EXPERTS, BOTTLENECK = 9, 16, 6, 3


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stack(experts: int, seed: int) -> ExpertStack:
    stack = ExpertStack(experts, HIDDEN, BOTTLENECK)
    with torch.no_grad():
        for number, parameter in enumerate(stack.parameters()):
            parameter.copy_(_random(*parameter.shape, seed=seed + number))
    return stack


def _one_by_one(hidden_TH: Tensor, weights: Sequence[Tensor], gates_TE: Tensor) -> Tensor:
    output_TH = torch.zeros_like(hidden_TH)
    for expert, (down, down_bias, up, up_bias) in enumerate(zip(*weights, strict=True)):
        narrow = F.gelu(F.linear(hidden_TH, down, down_bias))
        output_TH = output_TH + gates_TE[:, expert, None] * F.linear(narrow, up, up_bias)
    return output_TH


@pytest.mark.parametrize("shared_experts", [0, 1, 2])
def test_dense_experts_and_their_gradients(shared_experts: int) -> None:
    routed = _stack(EXPERTS, seed=10)
    shared = _stack(shared_experts, seed=20) if shared_experts else None
    of_shared = None if shared is None else shared.weights()
    hidden, gates = _random(TOKENS, HIDDEN, seed=1).requires_grad_(), _random(TOKENS, EXPERTS, seed=2).requires_grad_()
    expected = _one_by_one(hidden, routed.weights(), gates)
    if shared is not None:
        expected = expected + _one_by_one(hidden, shared.weights(), torch.ones(TOKENS, shared_experts))
    actual = dense_experts(hidden, routed.weights(), gates, of_shared)
    torch.testing.assert_close(actual, expected)
    inputs = [hidden, gates, *routed.parameters(), *(shared.parameters() if shared is not None else ())]
    weight = _random(TOKENS, HIDDEN, seed=3)
    for ours, autograds in zip(
        torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-5)


def test_in_bf16_the_parameters_and_gates_keep_fp32_gradients_that_are_close() -> None:
    routed, shared = _stack(EXPERTS, seed=10), _stack(1, seed=20)
    hidden, gates = _random(TOKENS, HIDDEN, seed=1), _random(TOKENS, EXPERTS, seed=2)
    weight, gradients = _random(TOKENS, HIDDEN, seed=3), {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [hidden.to(dtype).requires_grad_(), gates.clone().requires_grad_(), *routed.parameters()]
        output = dense_experts(inputs[0], routed.weights(), inputs[1], shared.weights())
        assert output.dtype is dtype
        gradients[dtype] = torch.autograd.grad(output, inputs, weight.to(dtype))
    for exact, rounded in zip(gradients[torch.float32], gradients[torch.bfloat16], strict=True):
        assert (exact - rounded).abs().max() < 0.03 * exact.abs().max()
    assert all(gradient.dtype is torch.float32 for gradient in gradients[torch.bfloat16][1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_are_linear_modules_one_after_another(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linears = [
        nn.ModuleDict({"down": nn.Linear(HIDDEN, BOTTLENECK), "up": nn.Linear(BOTTLENECK, HIDDEN)}) for _ in range(3)
    ]
    packed = RoutedExperts(3, HIDDEN, BOTTLENECK, "group")
    own = {f"deepspeed_experts.{n}.{k}": v for n, linear in enumerate(linears) for k, v in linear.state_dict().items()}
    packed.load_state_dict(own)
    assert list(packed.state_dict()) == list(own)
    assert all(torch.equal(value, own[name]) for name, value in packed.state_dict().items())
    flat = torch.cat([parameter.flatten() for linear in linears for parameter in linear.parameters()])
    assert torch.equal(packed.packed.flatten(), flat), "not as ZeRO lays the tensors of modules"
    weights = unpack(packed.packed, packed.shapes, dtype)
    for kind, stacked in zip(ExpertWeights._fields, weights, strict=True):
        each = [linear.get_parameter(kind.replace("_", ".")) for linear in linears]
        assert torch.equal(stacked, torch.stack(list(each)).to(dtype))
    factors = [_random(*stacked.shape, seed=number).to(dtype) for number, stacked in enumerate(weights)]
    torch.stack([(stacked * factor).sum() for stacked, factor in zip(weights, factors, strict=True)]).sum().backward()
    expected = torch.cat([factor[number].flatten() for number in range(3) for factor in factors]).float()
    assert packed.packed.grad is not None and torch.equal(packed.packed.grad.flatten(), expected)


def test_packed_experts_refuse_other_state_dicts() -> None:
    packed = RoutedExperts(2, HIDDEN, BOTTLENECK, "group")
    sound = packed.state_dict()
    name = "deepspeed_experts.1.up.bias"
    for wrong, words in (
        ({k: v for k, v in sound.items() if k != name}, f"Missing key.*{name}"),
        (sound | {"deepspeed_experts.2.up.bias": sound[name]}, "Unexpected key.*deepspeed_experts.2.up.bias"),
        (sound | {name: sound[name][:3]}, rf"{name} has shape \[3\]"),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){words}"):
            packed.load_state_dict(wrong)


def _routes(tokens: int, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Two experts of each token, never the last expert; and which routes count: expert 1 takes none."""
    experts_TK = _random(tokens, EXPERTS - 1, seed=seed).topk(2, dim=1).indices
    return experts_TK, experts_TK != 1


def _ragged(
    hidden_TH: Tensor, gates_TK: Tensor, weights: Sequence[Tensor], experts_TK: Tensor, kept_TK: Tensor, training: bool
) -> Tensor:
    """The routed experts of one rank, as the dispatch puts them together."""
    counts = torch.bincount(experts_TK[kept_TK], minlength=EXPERTS).tolist()
    order_R, tokens = by_expert(experts_TK.flatten(), kept_TK.flatten(), 2, sum(counts))
    groups = Groups.of([counts], training, hidden_TH.device)
    rows = groups.placement.after(tokens)
    gates_P = groups.gates(gates_TK.flatten()[order_R])
    packed_EP = torch.cat([part.flatten(1) for part in weights], dim=1)
    shapes = tuple(tuple(part.shape[1:]) for part in weights)
    laid_out = lay_out(packed_EP, shapes, hidden_TH.dtype)
    return rows.collect(ragged_experts(rows.spread(hidden_TH), gates_P, packed_EP, shapes, laid_out, groups))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden_size", [HIDDEN, 10])  # a multiple of what grouped products want, and none
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
def test_ragged_experts_and_their_gradients_leave_dropped_routes_out(
    tokens: int, hidden_size: int, training: bool
) -> None:
    stack = ExpertStack(EXPERTS, hidden_size, BOTTLENECK)
    with torch.no_grad():
        for number, parameter in enumerate(stack.parameters()):
            parameter.copy_(_random(*parameter.shape, seed=10 + number))
    hidden = _random(tokens, hidden_size, seed=1).requires_grad_()
    gates = _random(tokens, 2, seed=2).requires_grad_()
    experts, kept = _routes(tokens)
    gates_TE = torch.zeros(tokens, EXPERTS).scatter(1, experts, gates * kept)
    expected = _one_by_one(hidden, stack.weights(), gates_TE)
    actual = _ragged(hidden, gates, stack.weights(), experts, kept, training)
    torch.testing.assert_close(actual, expected)
    inputs, weight = [hidden, gates, *stack.parameters()], _random(tokens, hidden_size, seed=3)
    for ours, autograds in zip(
        torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(ours, autograds, rtol=1e-5, atol=1e-5)
    assert (
        torch.autograd.grad(_ragged(hidden, gates, stack.weights(), experts, kept, training), [gates], weight)[0][~kept]
        .eq(0)
        .all()
    )


def test_ragged_experts_in_bf16_are_close_and_sum_in_fp32() -> None:
    stack, (experts, kept) = _stack(EXPERTS, seed=10), _routes(70)
    hidden, gates = _random(70, HIDDEN, seed=1), _random(70, 2, seed=2)
    exact = _ragged(hidden, gates, stack.weights(), experts, kept, True)
    rounded = _ragged(hidden.bfloat16(), gates, stack.weights(), experts, kept, True)
    assert rounded.dtype is torch.bfloat16
    assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
    ones = torch.tensor([[1.0], [2.0**-8], [2.0**-8]]).bfloat16()  # in bf16, each of the small ones would be lost
    one_bag = Placement(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.tensor([0]))
    assert one_bag.collect(ones).item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_wide_experts_one_after_the_other_are_those_of_all_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, (experts, kept) = _stack(EXPERTS, seed=10), _routes(70)  # experts without rows among them
    hidden, gates, weight = _random(70, HIDDEN, seed=1).to(dtype), _random(70, 2, seed=2), _random(70, HIDDEN, seed=3)
    found = []
    for wide in (0, ragged.WIDE):
        monkeypatch.setattr(ragged, "WIDE", wide)
        output = _ragged(hidden, gates, stack.weights(), experts, kept, True)
        found.append(torch.autograd.grad(output, list(stack.parameters()), weight.to(dtype)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("hidden_size", [24, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_evaluation_no_bit_depends_on_the_number_or_place_of_rows(dtype: torch.dtype, hidden_size: int) -> None:
    stack = ExpertStack(EXPERTS, hidden_size, BOTTLENECK)
    with torch.no_grad():
        for number, parameter in enumerate(stack.parameters()):
            parameter.copy_(_random(*parameter.shape, seed=10 + number))
    hidden, gates = _random(300, hidden_size, seed=1).to(dtype), _random(300, 2, seed=2)
    experts, _ = _routes(300)
    everything = torch.ones_like(experts, dtype=torch.bool)
    together = _ragged(hidden, gates, stack.weights(), experts, everything, False)
    for first, last in ((0, 1), (17, 60), (123, 300)):
        some = slice(first, last)
        alone = _ragged(hidden[some], gates[some], stack.weights(), experts[some], everything[some], False)
        assert alone.equal(together[some])


def test_rows_of_several_ranks_meet_by_expert_and_go_back() -> None:
    counts = [[2, 0, 3], [1, 0, 40]]
    groups = Groups.of(counts, True, torch.device("cpu"))
    owner = torch.tensor([0] * 2 + [2] * 3 + [0] + [2] * 40)
    rows = torch.stack([owner, torch.arange(46)], dim=1).float()
    placed = groups.placement.spread(rows)
    assert groups.sizes == [8, 0, 48]
    for expert, group in enumerate(placed.split(groups.sizes)):
        real = sum(count[expert] for count in counts)
        assert group[:real, 0].eq(expert).all() and group[:real, 1].diff().gt(0).all()
    assert groups.placement.collect(placed).equal(rows)
    assert groups.gates(torch.ones(46)).sum() == 46
