"""A gated bottleneck without biases, ``E(h) = out(SiLU(gate(h)) * in(h))``: the feed-forward network of the LLM, small.

Source: SwiGLU (arXiv 2002.05202), as in the experts of Mixtral (arXiv 2401.04088) and DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mome_dist.moe.forms.base import Part, WideForm

if TYPE_CHECKING:
    from torch import Tensor


class Gated(WideForm):
    """3 H b numbers."""

    parts = (Part("gate_weight", "bH"), Part("in_weight", "bH"), Part("out_weight", "Hb", "zero"))
    narrows = True

    def units(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """One product times SiLU of the other."""
        from torch.nn import functional as F

        gate_WH, in_WH = parts
        return F.silu(F.linear(rows_NH, gate_WH)) * F.linear(rows_NH, in_WH)
