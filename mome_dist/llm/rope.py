"""Rotary positions: frequencies, plain and with the scaling of Llama 3, and the turn itself.

Megatron-Core has the Llama-3 rule too, but with Llama 3.1's low and high frequency factors and original context built
in; only the factor is an argument. Here every value of a ``config.json`` counts. The arithmetic follows transformers
operation by operation, so the frequencies are equal bit for bit.

Rotary positions: Su et al., "RoFormer", arXiv 2104.09864. Scaling: "The Llama 3 Herd of Models", arXiv 2407.21783, and
Meta's reference code of Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mome_dist.llm.shape import LLMShape


def inverse_frequencies(shape: LLMShape) -> Tensor:
    """Radians per position of each pair of channels, fp32 [head_size / 2], fastest first.

    A frequency that turns often over the original context stays, one that hardly turns once is divided by the factor,
    and in between the two are blended linearly in the number of turns.
    """
    channels = torch.arange(0, shape.head_size, 2, dtype=torch.float32)
    frequencies = 1.0 / shape.rope_base ** (channels / shape.head_size)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines for the tokens of a pass, for all heads of a group at once.

    A group of heads lies as its queries, its key, its value; the value is turned by nothing.

    Attributes:
        cos_N1Xd, sin_N1Xd: [N, 1, Q + 2, d]; the sines of the first half of the channels are negated.
    """

    cos_N1Xd: Tensor
    sin_N1Xd: Tensor

    @classmethod
    def of(cls, positions_N: Tensor, frequencies: Tensor, queries: int, dtype: torch.dtype) -> Self:
        """The rotation at some positions.

        Args:
            frequencies: fp32 [d / 2], see `inverse_frequencies`.
            queries: Q, heads that share a key and a value.
        """
        angles_Nf = positions_N[:, None].float() * frequencies
        cos_Nd = torch.cat([angles_Nf, angles_Nf], dim=1).cos()
        sin_Nd = torch.cat([-angles_Nf, angles_Nf], dim=1).sin()
        turned_X = torch.arange(queries + 2, device=positions_N.device) < queries + 1
        cos_NXd = torch.where(turned_X[:, None], cos_Nd[:, None], 1.0)
        sin_NXd = torch.where(turned_X[:, None], sin_Nd[:, None], 0.0)
        return cls(cos_NXd[:, None].to(dtype), sin_NXd[:, None].to(dtype))

    def __call__(self, qkv_NGXd: Tensor) -> Tensor:
        """Turn queries and keys: [N, G, Q + 2, d] -> the same."""
        return _Rotate.apply(qkv_NGXd, self)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of its input; the turn back is its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv_NGXd: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        swapped = qkv_NGXd.roll(qkv_NGXd.shape[-1] // 2, dims=-1)
        return torch.mul(qkv_NGXd, rotation.cos_N1Xd).addcmul_(swapped, rotation.sin_N1Xd)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), rotation = gradients, ctx.rotation
        swapped = (gradient * rotation.sin_N1Xd).roll(gradient.shape[-1] // 2, dims=-1)
        return swapped.addcmul_(gradient, rotation.cos_N1Xd), None
