"""SwiGLU between the products of a frozen feed-forward network: ``silu(gate) * up``.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F], gates first -> [..., F], same dtype."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, and writes both halves of its gradient where they belong: autograd keeps the activated
    gate too, and joins the halves in another pass over memory."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward(gradients[0] * up, gate, grad_input=of_gate)
        return result
