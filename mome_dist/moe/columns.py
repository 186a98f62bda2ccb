"""Experts one after another in one tensor, as stacks of their parts, and back.

Shape suffixes: E experts, P numbers of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of an expert's parts, in the order in which they lie."""


def unpack(packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Experts that lie one after another -> stacked parts in ``dtype``, views of one tensor."""
    return _Unpack.apply(packed_EP, shapes, dtype)


def columns(packed_EP: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """`unpack` in the tensor's own dtype, without a gradient of its own."""
    parts = packed_EP.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))


def packed_gradient(gradients: Sequence[Tensor], shapes: Shapes, dtype: torch.dtype) -> Tensor:
    """Gradients of the parts [E, ...] -> that of the packed experts [E, P], in
    ``dtype``: every part is cast and put in its place in one operation."""
    packed_EP = gradients[0].new_empty(gradients[0].shape[0], sum(map(math.prod, shapes)), dtype=dtype)
    for column, gradient in zip(columns(packed_EP, shapes), gradients, strict=True):
        column.copy_(gradient)
    return packed_EP


class _Unpack(torch.autograd.Function):
    """Its gradient is one pass over memory, where those of slices and of a cast are many."""

    @staticmethod
    def forward(ctx: Any, packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.dtype = shapes, packed_EP.dtype
        return columns(packed_EP.to(dtype), shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return packed_gradient(gradients, ctx.shapes, ctx.dtype), None, None
