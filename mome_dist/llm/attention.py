"""Causal self-attention for Megatron-Core layers, on any device.

Sequences are padded on the right and attention is causal, so no real token ever attends to padding and no mask beyond
the causal one is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    """Core attention with grouped key-value heads. ``kernel``: "eager" (explicit products) or "sdpa" (fused)."""

    kernel = "sdpa"

    def __init__(self, config: TransformerConfig, layer_number: int, **_unused: Any) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0, "the frozen LLM has no dropout"
        self.scale = 1 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_mask: Any, **_unused: Any) -> Tensor:
        """query [S, B, heads, d], key and value [S, B, kv_heads, d] -> [S, B, heads * d]."""
        query_BNSd, key_BGSd, value_BGSd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.kernel == "eager":
            output_BNSd = self._eager(query_BNSd, key_BGSd, value_BGSd)
        else:
            output_BNSd = F.scaled_dot_product_attention(
                query_BNSd, key_BGSd, value_BGSd, is_causal=True, scale=self.scale, enable_gqa=True
            )
        return output_BNSd.permute(2, 0, 1, 3).flatten(2)

    def _eager(self, query_BNSd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor) -> Tensor:
        batch, heads, length, _ = query_BNSd.shape
        groups = key_BGSd.shape[1]
        # The heads of one group share keys: fold them into the rows of one product instead of copying keys.
        query = query_BNSd.reshape(batch, groups, -1, query_BNSd.shape[-1])
        scores = torch.matmul(query, key_BGSd.transpose(-1, -2)).float() * self.scale
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.view(batch, groups, heads // groups, length, length).masked_fill(future, -torch.inf)
        weights = scores.softmax(dim=-1).to(value_BGSd.dtype).view(batch, groups, -1, length)
        return torch.matmul(weights, value_BGSd).view(batch, heads, length, -1)


class EagerCausalAttention(CausalAttention):
    kernel = "eager"


def attention_class(kernel: str, device: torch.device) -> type[CausalAttention]:
    """Resolve "auto": at a few dozen tokens a sequence explicit products are faster on CPU, the fused kernel on GPU."""
    if kernel == "auto":
        kernel = "eager" if device.type == "cpu" else "sdpa"
    return EagerCausalAttention if kernel == "eager" else CausalAttention
