"""Two linear maps with nothing between them, ``E(h) = up(down(h))``: a LoRA as an expert.

With identical experts whose gates add up to one it is one LoRA of rank b; with equal gates of all E experts, one of
rank E b that is scaled by 1/E; with b = 1, the experts of MoR1E (arXiv 2404.08985).
Source: LoRAMoE (arXiv 2312.09979), and MoLoRA (arXiv 2309.05444); without their scale, which the learning rate is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mome_dist.moe.forms.base import Part, WideForm

if TYPE_CHECKING:
    from torch import Tensor


class Linear(WideForm):
    """2 H b numbers."""

    parts = (Part("a_weight", "bH"), Part("b_weight", "Hb", "zero"))
    narrows = True

    def units(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """The first map."""
        from torch.nn import functional as F

        return F.linear(rows_NH, *parts)

    def kept(self, hidden_size: int, bottleneck: int) -> int:
        """Units, and they times their gates."""
        return 2 * bottleneck
