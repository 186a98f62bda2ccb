"""All of MoME's bottleneck experts as two products, with a backward pass of their own.

The form itself is `mome_dist.moe.forms.bottleneck`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class ExpertWeights(NamedTuple):
    """Weights of N bottleneck experts, stacked: ``down_weight`` [N, b, H], ``down_bias`` [N, b], ``up_weight``
    [N, H, b], ``up_bias`` [N, H]."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


def dense_experts(
    hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor, shared: Sequence[Tensor] | None = None
) -> Tensor:
    """Gate-weighted sum of experts as one down-projection of all of them, the gates as a mask, and one up-projection.

    For bottlenecks of a few units this is far less work than sorting tokens by expert, and a token's output never
    depends on its neighbours.

    Args:
        hidden_TH: [T, H].
        routed: `ExpertWeights` of E experts.
        gates_TE: fp32 [T, E], zero where an expert is not used.
        shared: those of experts that every token uses with a gate of one.

    Returns:
        [T, H] in the dtype of ``hidden_TH``, which is also that of the matrix products.
    """
    return _DenseExperts.apply(hidden_TH, gates_TE, *routed, *(shared or ()))


class _DenseExperts(torch.autograd.Function):
    """`dense_experts` with its own backward pass, which needs a third of the passes over memory that autograd makes:
    the activations stay in the precision of the products, and nothing is concatenated or cast twice.

    Shape suffixes: X all experts, routed first; N their units, expert by expert; M = N + X, the inputs of the
    up-projection. The gates are what multiplies the output biases: as further inputs, one product does it all.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, gates_TE: Tensor, *stacks: Tensor) -> Tensor:
        weights = [ExpertWeights(*stacks[i : i + 4]) for i in range(0, len(stacks), 4)]
        down_NH, up_HM = joined_maps(weights, hidden_TH.dtype)
        down_bias_N = _joined_biases(weights, hidden_TH.dtype)
        units, experts = down_NH.shape[0], up_HM.shape[1] - down_NH.shape[0]
        narrow_TN = F.linear(hidden_TH, down_NH, down_bias_N)
        active_TN = F.gelu(narrow_TN)
        inputs_TM = hidden_TH.new_empty(hidden_TH.shape[0], up_HM.shape[1])
        gates_TX = inputs_TM[:, units:]
        gates_TX[:, : gates_TE.shape[1]] = gates_TE
        gates_TX[:, gates_TE.shape[1] :] = 1
        gates_TN = gates_TX.repeat_interleave(units // experts, dim=1)
        torch.mul(active_TN, gates_TN, out=inputs_TM[:, :units])
        ctx.save_for_backward(hidden_TH, narrow_TN, active_TN, gates_TN, inputs_TM, down_NH, up_HM)
        ctx.experts, ctx.types = [each.up_bias.shape[0] for each in weights], [part.dtype for part in stacks]
        return F.linear(inputs_TM, up_HM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, ...]:
        (grad_TH,) = output_gradients
        hidden_TH, narrow_TN, active_TN, gates_TN, inputs_TM, down_NH, up_HM = ctx.saved_tensors
        routed, experts, units = ctx.experts[0], sum(ctx.experts), down_NH.shape[0]
        grad_inputs_TM = grad_TH @ up_HM
        grad_gated_TN, grad_bias_gates_TX = grad_inputs_TM.split([units, experts], dim=1)
        by_unit_TXb = (grad_gated_TN * active_TN).unflatten(1, (experts, -1))
        grad_gates_TE = by_unit_TXb[:, :routed].sum(dim=2, dtype=torch.float32) + grad_bias_gates_TX[:, :routed]
        grad_narrow_TN = torch.ops.aten.gelu_backward(grad_gated_TN * gates_TN, narrow_TN)
        gradients = weight_gradients(grad_TH, inputs_TM, grad_narrow_TN, hidden_TH, ctx.experts)
        stacks = [part for stack in gradients for part in stack]
        return (
            grad_narrow_TN @ down_NH,
            grad_gates_TE,
            *(part.to(dtype) for part, dtype in zip(stacks, ctx.types, strict=True)),
        )


def joined_maps(stacks: Sequence[ExpertWeights], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All experts as one wide one, in the products' precision: down-projection [N, H], up-projection [H, M] with the
    output biases as its last columns. Every part is cast and put in its place in one operation."""
    units, hidden_size = stacks[0].down_weight.shape[1:]
    count = sum(stack.up_bias.shape[0] for stack in stacks)
    like = stacks[0].down_weight.new_empty(0, dtype=dtype)
    down_XbH = like.new_empty(count, units, hidden_size)
    up_HM = like.new_empty(hidden_size, count * (units + 1))
    up_HXb, up_bias_HX = up_HM[:, : count * units].unflatten(1, (count, units)), up_HM[:, count * units :]
    for stack, own in _places(stacks):
        down_XbH[own].copy_(stack.down_weight)
        up_HXb[:, own].copy_(stack.up_weight.transpose(0, 1))
        up_bias_HX[:, own].copy_(stack.up_bias.t())
    return down_XbH.flatten(0, 1), up_HM


def _joined_biases(stacks: Sequence[ExpertWeights], dtype: torch.dtype) -> Tensor:
    """The down-projections' biases, [N]."""
    count, units = sum(stack.up_bias.shape[0] for stack in stacks), stacks[0].down_bias.shape[1]
    bias_Xb = stacks[0].down_bias.new_empty(count, units, dtype=dtype)
    for stack, own in _places(stacks):
        bias_Xb[own].copy_(stack.down_bias)
    return bias_Xb.flatten()


def _places(stacks: Sequence[ExpertWeights]) -> Iterator[tuple[ExpertWeights, slice]]:
    """Every stack with where its experts lie among all."""
    experts = [stack.up_bias.shape[0] for stack in stacks]
    for stack, start, size in zip(stacks, itertools.accumulate([0, *experts]), experts, strict=False):
        yield stack, slice(start, start + size)


def weight_gradients(
    grad_TH: Tensor, inputs_TM: Tensor, grad_narrow_TN: Tensor, hidden_TH: Tensor, experts: Sequence[int]
) -> list[ExpertWeights]:
    """Gradients of every stack's weights, in the products' precision, as views.

    Args:
        grad_TH: of the output.
        inputs_TM: of the up-projection.
        grad_narrow_TN: of what GELU is taken of.
        hidden_TH: inputs of the down-projection.
        experts: of each stack.
    """
    count = sum(experts)
    grad_up_HN, grad_up_bias_HX = (grad_TH.t() @ inputs_TM).split([grad_narrow_TN.shape[1], count], dim=1)
    gradients = ExpertWeights(
        (grad_narrow_TN.t() @ hidden_TH).unflatten(0, (count, -1)),
        grad_narrow_TN.sum(dim=0).unflatten(0, (count, -1)),
        grad_up_HN.unflatten(1, (count, -1)).transpose(0, 1),
        grad_up_bias_HX.t(),
    )
    by_stack = zip(*(gradient.split(list(experts)) for gradient in gradients), strict=True)
    return [ExpertWeights(*parts) for parts in by_stack]
