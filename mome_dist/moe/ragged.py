"""Experts of unequal loads as products over contiguous rows: no expert's rows are padded to another one's number.

Rows lie expert by expert. The gate of a route multiplies the b values inside its expert and not the H values that come
out: it costs a fraction, and the sum over a token's experts is a plain one, whose gradient needs no products.

Shape suffixes: N rows in their first order, P places of rows in expert order with their padding, c units of an expert
padded to a multiple of `UNIT_ALIGNMENT`: its b units, one that is always 1 and has the output bias for weights, zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mome_dist.moe.columns import Shapes, columns
from mome_dist.moe.fused_bottleneck import ExpertWeights
from mome_dist.transfer import sent_to

UNIT_ALIGNMENT = 8
# Numbers of an expert's weight gradient from which on a CPU takes one expert after the other: each is then cast to the
# parameter's precision while it is still in the cache. For smaller ones the calls would take longer than that saves.
WIDE = 2**16
# Rows of every product in evaluation. A row's result depends on how many rows its product has, to the last bit; with
# one number of rows for all products it cannot depend on what shares the batch.
EVALUATION_ROWS = 32


@dataclass(frozen=True)
class Placement:
    """Copies of rows in other places, from none to several of each; and the sum of its copies for every row.

    `spread` and `collect` are each other's gradient. Places that nobody collects are padding: they hold some row, and
    what is done there must come to nothing.

    Attributes:
        take_P: int64 [P], the row that stands at each place.
        places: int64, the places of the copies of row 0, then of row 1, and so on.
        starts_N: int64 [N], where each row's copies start in ``places``; None if every row has exactly one copy.
    """

    take_P: Tensor
    places: Tensor
    starts_N: Tensor | None = None

    def spread(self, rows_NH: Tensor) -> Tensor:
        """[N, H] -> [P, H]."""
        return _Move.apply(rows_NH, self, False)

    def collect(self, rows_PH: Tensor) -> Tensor:
        """[P, H] -> [N, H], sums in fp32."""
        return _Move.apply(rows_PH, self, True)

    def after(self, first: Placement) -> Placement:
        """Both at once, ``first`` and then this one, where every row has one copy."""
        return Placement(first.take_P[self.take_P], self.places[first.places], first.starts_N)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, placement: Placement, back: bool) -> Tensor:
        ctx.placement, ctx.back = placement, back
        return _moved(rows, placement, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _moved(gradients[0], ctx.placement, not ctx.back), None, None


def _moved(rows: Tensor, placement: Placement, back: bool) -> Tensor:
    if not back:
        return rows.index_select(0, placement.take_P)
    if placement.starts_N is None:
        return rows.index_select(0, placement.places)
    if not rows.shape[0]:
        return rows.new_zeros(placement.starts_N.numel(), rows.shape[1])
    # A bag of no rows is zero; sums are accumulated in fp32.
    return F.embedding_bag(placement.places, rows, placement.starts_N, mode="sum")


def by_expert(keys_N: Tensor, kept_N: Tensor, copies_of: int, kept: int) -> tuple[Tensor, Placement]:
    """Routes in the order of their experts, equal ones in the order of their tokens.

    Args:
        keys_N: int64 [T * K], the expert of each route, token by token.
        kept_N: bool [T * K], the routes that count.
        copies_of: K, routes of a token.
        kept: how many count.

    Returns:
        int64 [kept]: the routes in their new order; and the placement of tokens into it.
    """
    order_R = torch.where(kept_N, keys_N, torch.iinfo(keys_N.dtype).max).argsort(stable=True)[:kept]
    per_token_T = kept_N.view(-1, copies_of).sum(dim=1)
    return order_R, Placement(order_R // copies_of, order_R.argsort(), per_token_T.cumsum(0) - per_token_T)


@dataclass(frozen=True)
class Groups:
    """Rows in expert order, as the products want them.

    Attributes:
        placement: from rows in order of (source rank, expert), one copy of each.
        sizes: rows of every expert's group, padding included.
        block: rows of a product; None for one product a group.
        expert_P: int64 [P], the expert of each place.
        ends_E: int32 [E], the end of each group.
    """

    placement: Placement
    sizes: list[int]
    block: int | None
    expert_P: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, counts: list[list[int]], training: bool, device: torch.device) -> Groups:
        """Groups of the rows that came from each rank (first axis) for each expert (second axis).

        The host, which knows the counts, works out all places and sends them in one copy that nobody waits for.
        """
        block = None if training else EVALUATION_ROWS
        counts_SE = np.array(counts, dtype=np.int64)
        runs = counts_SE.ravel()
        totals_E = counts_SE.sum(axis=0)
        sizes = [_padded(rows) if block is None else -(-rows // block) * block for rows in totals_E.tolist()]
        sizes_E = np.array(sizes, dtype=np.int64)
        # Where each (rank, expert) run of rows starts, in the order in which they came and in expert order.
        came_SE = (runs.cumsum() - runs).reshape(counts_SE.shape)
        goes_SE = (sizes_E.cumsum() - sizes_E) + (counts_SE.cumsum(axis=0) - counts_SE)
        rows_N = np.arange(runs.sum())
        places_N = rows_N + (goes_SE - came_SE).ravel().repeat(runs)
        take_P = np.zeros(sizes_E.sum(), dtype=np.int64)
        take_P[places_N] = rows_N
        parts = take_P, places_N, np.arange(len(sizes)).repeat(sizes_E), sizes_E.cumsum()
        sent = sent_to(torch.from_numpy(np.concatenate(parts)), device)
        take, places, expert_P, ends_E = sent.split([len(part) for part in parts])
        return cls(Placement(take, places), sizes, block, expert_P, ends_E.to(torch.int32))

    def gates(self, gates_N: Tensor) -> Tensor:
        """fp32 [N] -> [P], zero for padding."""
        return gates_N.new_zeros(self.placement.take_P.numel()).index_copy(0, self.placement.places, gates_N)


def _padded(rows: int) -> int:
    """Rows rounded up, by an eighth at most above 64: bf16 kernels are compiled for each number of rows that occurs,
    which for numbers as they come takes longer than the products."""
    step = max(8, 1 << max((rows - 1).bit_length() - 4, 0))
    return -(-rows // step) * step


class LaidOut(NamedTuple):
    """Weights of E experts as the products want them: ``down_EcH`` [E, c, H], ``down_bias_Eb`` [E, b], ``up_EHc``
    [E, H, c] with the output bias as the unit after the last one."""

    down_EcH: Tensor
    down_bias_Eb: Tensor
    up_EHc: Tensor


@torch.no_grad()
def lay_out(packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> LaidOut:
    """Experts that lie one after another (`mome_dist.moe.columns`), in the products' precision. Every weight is read
    once and written once: cast and put in its place in one operation, and no matrix is transposed."""
    weights = ExpertWeights(*columns(packed_EP, shapes))
    experts, units, hidden_size = weights.down_weight.shape
    width = -(-(units + 1) // UNIT_ALIGNMENT) * UNIT_ALIGNMENT
    down_EcH = packed_EP.new_empty(experts, width, hidden_size, dtype=dtype)
    up_EHc = packed_EP.new_empty(experts, hidden_size, width, dtype=dtype)
    down_EcH[:, :units] = weights.down_weight
    down_EcH[:, units:] = 0
    up_EHc[..., :units] = weights.up_weight
    up_EHc[..., units] = weights.up_bias
    up_EHc[..., units + 1 :] = 0
    return LaidOut(down_EcH, weights.down_bias.to(dtype), up_EHc)


def ragged_experts(
    rows_PH: Tensor, gates_P: Tensor, packed_EP: Tensor, shapes: Shapes, laid_out: LaidOut, groups: Groups
) -> Tensor:
    """Each row through the expert of its group, times its gate.

    Args:
        rows_PH: [P, H] as ``groups`` places them.
        gates_P: fp32 [P], zero for padding.
        packed_EP: E experts, one after another, which get the gradient, in their own dtype.
        shapes: of an expert's parts.
        laid_out: their weights, from `lay_out`, in the dtype of ``rows_PH``.

    Returns:
        [P, H] in the dtype of ``rows_PH``, which is also that of the products.
    """
    return _RaggedExperts.apply(rows_PH, gates_P, packed_EP, shapes, laid_out, groups)


class _RaggedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PH: Tensor,
        gates_P: Tensor,
        packed_EP: Tensor,
        shapes: Shapes,
        laid_out: LaidOut,
        groups: Groups,
    ) -> Tensor:
        down_EcH, down_bias_Eb, up_EHc = laid_out
        units = down_bias_Eb.shape[1]
        narrow_Pc = _products(rows_PH, down_EcH.mT, groups)
        narrow_Pc[:, :units] += down_bias_Eb.index_select(0, groups.expert_P)
        active_Pc = F.gelu(narrow_Pc)
        active_Pc[:, units:] = 0
        active_Pc[:, units] = 1
        gates_P1 = gates_P[:, None].to(rows_PH.dtype)
        inputs_Pc = active_Pc * gates_P1
        ctx.save_for_backward(rows_PH, gates_P1, narrow_Pc, active_Pc, inputs_Pc, down_EcH, up_EHc)
        ctx.groups, ctx.shapes, ctx.dtype = groups, shapes, packed_EP.dtype
        return _products(inputs_Pc, up_EHc.mT, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_PH,) = gradients
        rows_PH, gates_P1, narrow_Pc, active_Pc, inputs_Pc, down_EcH, up_EHc = ctx.saved_tensors
        groups, units = ctx.groups, ctx.shapes[0][0]
        grad_gated_Pc = _products(grad_PH, up_EHc, groups)
        grad_gates_P = (grad_gated_Pc * active_Pc).sum(dim=1, dtype=torch.float32)
        grad_narrow_Pc = torch.ops.aten.gelu_backward(grad_gated_Pc * gates_P1, narrow_Pc)
        grad_narrow_Pc[:, units:] = 0
        grad_rows_PH = _products(grad_narrow_Pc, down_EcH, groups) if ctx.needs_input_grad[0] else None
        grad_packed_EP = grad_PH.new_empty(len(groups.sizes), sum(map(math.prod, ctx.shapes)), dtype=ctx.dtype)
        grads = ExpertWeights(*columns(grad_packed_EP, ctx.shapes))
        grad_bias_Ec = grad_narrow_Pc.new_zeros(len(groups.sizes), narrow_Pc.shape[1], dtype=torch.float32)
        grad_bias_Ec.index_add_(0, groups.expert_P, grad_narrow_Pc.float())
        grads.down_bias.copy_(grad_bias_Ec[:, :units])
        for experts, grad_down_cH in _row_products(grad_narrow_Pc, rows_PH, groups):
            grads.down_weight[experts] = grad_down_cH[..., :units, :]
        for experts, grad_up_Hc in _row_products(grad_PH, inputs_Pc, groups):
            grads.up_weight[experts] = grad_up_Hc[..., :units]
            grads.up_bias[experts] = grad_up_Hc[..., units]
        return grad_rows_PH, grad_gates_P, grad_packed_EP, None, None, None


def _products(rows_PA: Tensor, weight_EAB: Tensor, groups: Groups) -> Tensor:
    """Each row times the matrix of its expert: [P, A] -> [P, B]."""
    if groups.block is None and _aligned(rows_PA, weight_EAB):
        return F.grouped_mm(rows_PA, weight_EAB, offs=groups.ends_E)
    result_PB = rows_PA.new_empty(rows_PA.shape[0], weight_EAB.shape[2])
    for rows, weight, result in _each(groups, rows_PA, weight_EAB, result_PB):
        blocks = (rows,) if groups.block is None else rows.split(groups.block)
        for block, out in zip(blocks, result.split(groups.block or len(result)), strict=True):
            torch.mm(block, weight, out=out)
    return result_PB


def _row_products(left_PA: Tensor, right_PB: Tensor, groups: Groups) -> Iterator[tuple[int | slice, Tensor]]:
    """Sums of outer products over the rows of each expert: [E, A, B] of all experts at once, or [A, B] of one after the
    other, each to be used before the next one takes its place."""
    wide = left_PA.device.type == "cpu" and left_PA.shape[1] * right_PB.shape[1] >= WIDE
    if _aligned(left_PA, right_PB) and not wide:
        yield slice(None), F.grouped_mm(left_PA.t(), right_PB, offs=groups.ends_E)
        return
    product_AB = left_PA.new_empty(left_PA.shape[1], right_PB.shape[1])
    parts = zip(left_PA.split(groups.sizes), right_PB.split(groups.sizes), strict=True)
    for expert, (left, right) in enumerate(parts):
        if len(left):
            torch.mm(left.t(), right, out=product_AB)
        else:
            product_AB.zero_()
        yield expert, product_AB


def _aligned(*factors: Tensor) -> bool:
    """Whether grouped products can take the factors: it wants rows of whole 16 bytes, and some rows."""
    return all(factor.shape[-1] % UNIT_ALIGNMENT == 0 and factor.shape[0] for factor in factors)


def _each(groups: Groups, first_P: Tensor, each_E: Tensor, second_P: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An expert's rows of the first and last tensor and its own of the second, for experts with rows."""
    parts = zip(first_P.split(groups.sizes), each_E.unbind(), second_P.split(groups.sizes), strict=True)
    return (part for part in parts if part[0].shape[0])
