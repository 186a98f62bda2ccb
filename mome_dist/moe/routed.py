"""The routed experts that a rank holds, as one parameter.

DeepSpeed keeps four tensors of every expert, and its engine reduces, flattens and steps each of them by itself: 24
experts beside each of 30 layers are 2,880 tensors of a few thousand numbers. Here the experts of a layer lie one after
another in one tensor, each with its four parts in DeepSpeed's order. ZeRO lays separate tensors into its partitions in
just that order, so partitions hold the same numbers in the same places; and a state dict has DeepSpeed's names, so its
own checkpoints are the same too.

Shape suffixes: E experts, P numbers of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mome_dist.moe.experts import ExpertWeights
from mome_dist.packed_module import PackedModule, PackedTensor

NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")
"""Names of an expert's parts in DeepSpeed's state dicts, in the order of `ExpertWeights`."""


Shapes = tuple[tuple[int, ...], ...]
"""Of an expert's parts, in that order."""


class ExpertPart(NamedTuple):
    """One tensor of one expert in the parameter: the expert's number on its rank, the field of `ExpertWeights`, the
    first of its elements in row-major order, and its shape."""

    expert: int
    kind: str
    start: int
    shape: tuple[int, ...]


class RoutedExperts(PackedModule):
    """Stands where DeepSpeed's ``Experts`` does.

    Args:
        experts: of this rank.
        hidden_size, bottleneck: H and b.
        group_name: of the expert-parallel group, for DeepSpeed.

    Attributes:
        packed: fp32 [E, P].
        shapes: of an expert's parts.
    """

    def __init__(self, experts: int, hidden_size: int, bottleneck: int, group_name: str) -> None:
        super().__init__()
        self.num_local_experts = experts
        self.shapes = part_shapes(hidden_size, bottleneck)
        self.packed = nn.Parameter(torch.empty(experts, sum(map(math.prod, self.shapes))))
        # What DeepSpeed asks of a parameter: not to be reduced with the shared ones, but in this group.
        for name, value in (("allreduce", False), ("group_name", group_name)):
            setattr(self.packed, name, value)

    def parts(self) -> Iterator[ExpertPart]:
        """Every tensor of every expert, in order."""
        start = 0
        for expert in range(self.num_local_experts):
            for kind, shape in zip(ExpertWeights._fields, self.shapes, strict=True):
                yield ExpertPart(expert, kind, start, shape)
                start += math.prod(shape)

    def tensors(self) -> Iterator[PackedTensor]:
        """By DeepSpeed's names."""
        names = dict(zip(ExpertWeights._fields, NAMES, strict=True))
        for part in self.parts():
            name = f"deepspeed_experts.{part.expert}.{names[part.kind]}"
            yield PackedTensor(name, self.packed, part.start, part.shape)


def part_shapes(hidden_size: int, bottleneck: int) -> Shapes:
    """Shapes of an expert's parts, in the order of `ExpertWeights`."""
    return ((bottleneck, hidden_size), (bottleneck,), (hidden_size, bottleneck), (hidden_size,))


def unpack(packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> ExpertWeights:
    """Experts that lie one after another -> stacked parts in ``dtype``, views of one tensor."""
    return ExpertWeights(*_Unpack.apply(packed_EP, shapes, dtype))


def columns(packed_EP: Tensor, shapes: Shapes) -> ExpertWeights:
    """`unpack` in the tensor's own dtype, without a gradient of its own."""
    parts = packed_EP.split([math.prod(shape) for shape in shapes], dim=1)
    return ExpertWeights(*(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)))


def packed_gradient(gradients: Sequence[Tensor], shapes: Shapes, dtype: torch.dtype) -> Tensor:
    """Gradients of the parts [E, ...], in the order of `ExpertWeights` -> that of the packed experts [E, P], in
    ``dtype``: every part is cast and put in its place in one operation."""
    packed_EP = gradients[0].new_empty(gradients[0].shape[0], sum(map(math.prod, shapes)), dtype=dtype)
    for column, gradient in zip(columns(packed_EP, shapes), gradients, strict=True):
        column.copy_(gradient)
    return packed_EP


class _Unpack(torch.autograd.Function):
    """Its gradient is one pass over memory, where those of four slices and of a cast are nine."""

    @staticmethod
    def forward(ctx: Any, packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.dtype = shapes, packed_EP.dtype
        return tuple(columns(packed_EP.to(dtype), shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return packed_gradient(gradients, ctx.shapes, ctx.dtype), None, None
