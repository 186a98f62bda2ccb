"""The routed experts that a rank holds, as one parameter.

DeepSpeed keeps each tensor of every expert, and its engine reduces, flattens and steps each of them by itself: 24
experts of four parts beside each of 30 layers are 2,880 tensors of a few thousand numbers. Here the experts of a layer
lie one after another in one tensor, each with its parts in the order of `mome_dist.moe.forms.base.part_order`. ZeRO
lays separate tensors into its partitions in just that order, so partitions hold the same numbers in the same places;
and a state dict has DeepSpeed's names, so its own checkpoints are the same too.

Shape suffixes: E experts, P numbers of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mome_dist.moe.columns import columns
from mome_dist.moe.forms.base import Part
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.moe.ragged import Groups
from mome_dist.packed_module import PackedModule, PackedTensor


class ExpertPart(NamedTuple):
    """One tensor of one expert in the parameter: the expert's number on its rank, the part of its form, the first of
    its elements in row-major order, and its shape."""

    expert: int
    part: Part
    start: int
    shape: tuple[int, ...]


class RoutedExperts(PackedModule):
    """Stands where DeepSpeed's ``Experts`` does.

    Args:
        experts: of this rank.
        hidden_size, bottleneck: H and b.
        group_name: of the expert-parallel group, for DeepSpeed.
        expert: name of their form.

    Attributes:
        packed: fp32 [E, P].
        form: of the experts.
        shapes: of an expert's parts.
    """

    def __init__(self, experts: int, hidden_size: int, bottleneck: int, group_name: str, expert: str = DEFAULT) -> None:
        super().__init__()
        self.num_local_experts, self.form = experts, find_form(expert)
        self.shapes = self.form.shapes(hidden_size, bottleneck)
        self.packed = nn.Parameter(torch.empty(experts, sum(map(math.prod, self.shapes))))
        # What DeepSpeed asks of a parameter: not to be reduced with the shared ones, but in this group.
        for name, value in (("allreduce", False), ("group_name", group_name)):
            setattr(self.packed, name, value)

    def laid_out(self, dtype: torch.dtype) -> Any:
        """The weights of all experts as `ragged` wants them, in a dtype."""
        return self.form.lay_out(self.packed, self.shapes, dtype)

    def first_part(self) -> Tensor:
        """As in `mome_dist.moe.routers.base.ReadableExperts`, of this rank's experts."""
        return columns(self.packed, self.shapes)[0]

    def ragged(self, rows_PH: Tensor, gates_P: Tensor, laid_out: Any, groups: Groups) -> Tensor:
        """Each row through the expert of its group, times its gate (`ExpertForm.ragged`); gradients come back in
        fp32."""
        return self.form.ragged(rows_PH, gates_P, self.packed, self.shapes, laid_out, groups)

    def parts(self) -> Iterator[ExpertPart]:
        """Every tensor of every expert, in order."""
        start = 0
        for expert in range(self.num_local_experts):
            for part, shape in zip(self.form.parts, self.shapes, strict=True):
                yield ExpertPart(expert, part, start, shape)
                start += math.prod(shape)

    def tensors(self) -> Iterator[PackedTensor]:
        """By DeepSpeed's names."""
        for expert, part, start, shape in self.parts():
            yield PackedTensor(f"deepspeed_experts.{expert}.{part.saved_name}", self.packed, start, shape)
