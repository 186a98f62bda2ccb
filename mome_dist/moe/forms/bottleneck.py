"""MoME's expert, ``E(h) = up(GELU(down(h)))``, both linear maps with a bias.

Source: MoME (arXiv 2510.04136). Its fused forms are in `mome_dist.moe.fused_bottleneck`, `mome_dist.moe.ragged`,
`mome_dist.moe.packed` and `mome_dist.moe.triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mome_dist.moe.forms.base import Part, WideForm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mome_dist.moe.columns import Shapes
    from mome_dist.moe.plain_pack import Pack
    from mome_dist.moe.ragged import Groups

UNIT_ALIGNMENT = 8  # of the units of an expert, and one for its bias, in `mome_dist.moe.ragged`


class Bottleneck(WideForm):
    """2 H b + b + H numbers."""

    parts = (
        Part("down_weight", "bH"),
        Part("down_bias", "b", "zero"),
        Part("up_weight", "Hb", "zero"),
        Part("up_bias", "H", "zero"),
    )
    narrows = True
    kernel = True

    def units(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """GELU of the down-projection."""
        from torch.nn import functional as F

        down_WH, bias_W = parts
        return F.gelu(F.linear(rows_NH, down_WH, bias_W))

    def dense(
        self, hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor, shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """As `ExpertForm.dense`, with a backward pass of its own."""
        from mome_dist.moe.fused_bottleneck import dense_experts

        return dense_experts(hidden_TH, routed, gates_TE, shared)

    def lay_out(self, packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> Any:
        """As `ExpertForm.lay_out`: both maps padded, the output bias as one more unit."""
        from mome_dist.moe.ragged import lay_out

        return lay_out(packed_EP, shapes, dtype)

    def ragged(
        self, rows_PH: Tensor, gates_P: Tensor, packed_EP: Tensor, shapes: Shapes, laid_out: Any, groups: Groups
    ) -> Tensor:
        """As `ExpertForm.ragged`, as grouped products."""
        from mome_dist.moe.ragged import ragged_experts

        return ragged_experts(rows_PH, gates_P, packed_EP, shapes, laid_out, groups)

    def packed(
        self,
        maps_RH: Tensor | None,
        stacks: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        common: Sequence[Tensor] = (),
    ) -> Pack:
        """As `ExpertForm.packed`: output biases are one more unit."""
        from mome_dist.moe.packed import PackedExperts

        return PackedExperts(maps_RH, stacks, dtype)

    def kept(self, hidden_size: int, bottleneck: int) -> int:
        """Units before and after GELU, their gates, and their products."""
        return 4 * bottleneck

    def kept_of_rows(self, hidden_size: int, bottleneck: int) -> int:
        """Units before and after GELU, and times the gate, padded."""
        return 3 * self._padded(bottleneck)

    def joined(self, hidden_size: int, bottleneck: int) -> int:
        """Both maps, and the output bias as one more input of the second."""
        return (2 * bottleneck + 1) * hidden_size

    def joined_of_rows(self, hidden_size: int, bottleneck: int) -> int:
        """Both maps, padded."""
        return 2 * self._padded(bottleneck) * hidden_size

    def _padded(self, bottleneck: int) -> int:
        return -(-(bottleneck + 1) // UNIT_ALIGNMENT) * UNIT_ALIGNMENT
