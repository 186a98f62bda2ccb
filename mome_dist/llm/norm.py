"""Root-mean-square normalisation with the statistics in fp32, as Llama has it (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist import nvidia_apex


class _FrozenRMSNorm(torch.autograd.Function):
    """The norm on a CPU, with a gradient for its input only: the weight is frozen, and autograd's own record of the
    formula takes nearly twice the time of a layer's norms."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        scaled = wide * inverse
        ctx.save_for_backward(scaled, inverse, weight)
        return weight * scaled.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scaled, inverse, weight = ctx.saved_tensors
        gradient = (gradients[0] * weight).float()
        along = (gradient * scaled).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, scaled, along, value=-1).mul_(inverse).to(gradients[0].dtype), None, None


class RMSNorm(nn.Module):
    """``weight * x / rms(x)`` over the last dimension; Megatron-Core's own torch norm refuses sequence parallelism.

    On CUDA it is one kernel: of NVIDIA's Apex where that is installed, else of torch.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype), requires_grad=False)
        # Without its weight: Apex would compute the frozen weight's gradient too. Not `memory_efficient`, which takes
        # the input for its gradient from the rounded output.
        apex = nvidia_apex.fused_rms_norm()
        self._apex = None if apex is None else apex(hidden_size, eps=eps, elementwise_affine=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], same dtype."""
        if self._apex is not None and nvidia_apex.runs_on(hidden.device):
            normed: Tensor = self._apex(hidden)
            return self.weight * normed
        if hidden.is_cuda:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return _FrozenRMSNorm.apply(hidden, self.weight, self.eps)
