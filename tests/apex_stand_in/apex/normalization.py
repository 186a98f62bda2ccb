"""``FusedRMSNorm`` as Apex has it: statistics in fp32, result in the type of the input."""

from __future__ import annotations

import fused_layer_norm_cuda
import torch
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        assert not elementwise_affine and not memory_efficient
        self.register_parameter("weight", None)
        self.normalized_shape, self.eps = (normalized_shape,), eps

    def forward(self, input: Tensor) -> Tensor:
        assert input.shape[-1:] == self.normalized_shape
        fused_layer_norm_cuda.CALLS.append("rms_forward")
        wide = input.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(input.dtype)
