"""Operations with a backward pass of their own against the same sums written out for autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


from mome_dist.moe.experts import Bottleneck, ExpertStack, ExpertWeights, dense_experts, stack_weights

TOKENS, HIDDEN, EXPERTS, BOTTLENECK = 9, 16, 6, 3


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stack(experts: int, seed: int) -> ExpertStack:
    stack = ExpertStack(experts, HIDDEN, BOTTLENECK)
    with torch.no_grad():
        for number, parameter in enumerate(stack.parameters()):
            parameter.copy_(_random(*parameter.shape, seed=seed + number))
    return stack


def _one_by_one(hidden_TH: Tensor, weights: ExpertWeights, gates_TE: Tensor) -> Tensor:
    output_TH = torch.zeros_like(hidden_TH)
    for expert, (down, down_bias, up, up_bias) in enumerate(zip(*weights, strict=True)):
        narrow = F.gelu(F.linear(hidden_TH, down, down_bias))
        output_TH = output_TH + gates_TE[:, expert, None] * F.linear(narrow, up, up_bias)
    return output_TH


@pytest.mark.parametrize("shared_experts", [0, 1, 2])
def test_dense_experts_and_their_gradients(shared_experts: int) -> None:
    routed = _stack(EXPERTS, seed=10)
    shared = _stack(shared_experts, seed=20) if shared_experts else None
    hidden, gates = _random(TOKENS, HIDDEN, seed=1).requires_grad_(), _random(TOKENS, EXPERTS, seed=2).requires_grad_()
    expected = _one_by_one(hidden, routed.weights(), gates)
    if shared is not None:
        expected = expected + _one_by_one(hidden, shared.weights(), torch.ones(TOKENS, shared_experts))
    actual = dense_experts(hidden, routed.weights(), gates, shared)
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
        output = dense_experts(inputs[0], routed.weights(), inputs[1], shared)
        assert output.dtype is dtype
        gradients[dtype] = torch.autograd.grad(output, inputs, weight.to(dtype))
    for exact, rounded in zip(gradients[torch.float32], gradients[torch.bfloat16], strict=True):
        assert (exact - rounded).abs().max() < 0.03 * exact.abs().max()
    assert all(gradient.dtype is torch.float32 for gradient in gradients[torch.bfloat16][1:])


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def test_stacked_weights_are_the_modules_own() -> None:
    torch.manual_seed(0)
    modules = [Bottleneck(HIDDEN, BOTTLENECK) for _ in range(EXPERTS)]
    hidden, gates = _random(TOKENS, HIDDEN, seed=1), _random(TOKENS, EXPERTS, seed=2)
    dense_experts(hidden, stack_weights(modules), gates).sum().backward()
    grads = [[_gradient(parameter) for parameter in module.parameters()] for module in modules]
    for module in modules:
        module.zero_grad()
    sum(gates[:, e, None] * module(hidden) for e, module in enumerate(modules)).sum().backward()
    for module, ours in zip(modules, grads, strict=True):
        for parameter, gradient in zip(module.parameters(), ours, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_combine_and_its_gradients_leave_dropped_routes_out() -> None:
    slots, top_k = 20, 2
    results, gates = _random(slots, HIDDEN).requires_grad_(), _random(top_k, TOKENS, seed=1).requires_grad_()
    routes = torch.randperm(slots, generator=torch.Generator().manual_seed(2))[: top_k * TOKENS].view(top_k, TOKENS)
    routes[0, 3] = routes[1, 5] = slots
    padded = torch.cat([results, torch.zeros(1, HIDDEN)])
    expected = (padded[routes] * gates[..., None]).sum(dim=0)
    actual = _Combine.apply(results, routes, gates)
    torch.testing.assert_close(actual, expected)
    weight = _random(TOKENS, HIDDEN, seed=3)
    for ours, autograds in zip(
        torch.autograd.grad(actual, [results, gates], weight),
        torch.autograd.grad(expected, [results, gates], weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, autograds)
    assert torch.autograd.grad(_Combine.apply(results, routes, gates), [gates], weight)[0][0, 3] == 0
