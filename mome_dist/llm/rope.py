"""Rotary frequencies, plain and with the scaling of Llama 3.

Megatron-Core has the Llama-3 rule too, but with Llama 3.1's low and high frequency factors and original context built
in; only the factor is an argument. Here every value of a ``config.json`` counts. The arithmetic follows transformers
operation by operation, so the frequencies are equal bit for bit.

Rotary positions: Su et al., "RoFormer", arXiv 2104.09864. Scaling: "The Llama 3 Herd of Models", arXiv 2407.21783, and
Meta's reference code of Llama 3.1.
"""

from __future__ import annotations

import math

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
