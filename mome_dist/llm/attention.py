"""Causal self-attention over packed sequences, on any device.

No token sees another sequence. On CUDA the variable-length flash kernel of torch reads the sequences where they are;
elsewhere, and in fp32, those of one view are padded on the right for the products of attention alone. Attention is
causal, so that no real token ever attends to padding and no mask beyond the causal one is needed. Where layers are
captured, the host knows no lengths: there a mask keeps sequences apart in one product of all tokens.

Shape suffixes: N tokens, G groups of heads with a key and a value each, Q queries of a group, d channels of a head.
"""

from __future__ import annotations

import inspect
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.token_context import FixedTokens, TokenContext


class CausalAttention(nn.Module):
    """Core attention with grouped key-value heads.

    Args:
        kernel: "eager" (explicit products), "sdpa" (fused), or "auto": at a few dozen tokens a sequence explicit
            products are faster on a CPU, fused kernels on a GPU.
        head_size: d.
    """

    def __init__(self, kernel: str, head_size: int) -> None:
        super().__init__()
        self.kernel, self.scale = kernel, 1 / math.sqrt(head_size)

    def forward(self, qkv_NGXd: Tensor, context: TokenContext | FixedTokens) -> Tensor:
        """The queries of each group, then its key and its value, [N, G, Q + 2, d] -> [N, G * Q * d]."""
        kernel = self.kernel
        if kernel == "auto":
            kernel = "eager" if qkv_NGXd.device.type == "cpu" else "sdpa"
        if kernel == "sdpa" and _has_flash(qkv_NGXd.device, qkv_NGXd.dtype):
            return _flash(qkv_NGXd, context, self.scale)
        product = _eager if kernel == "eager" else _fused
        if isinstance(context, FixedTokens):
            query_GQNd, key_G1Nd, value_G1Nd = _split(qkv_NGXd.permute(1, 2, 0, 3)[None])
            key_GNd, value_GNd = key_G1Nd.squeeze(2), value_G1Nd.squeeze(2)
            output_GQNd = product(query_GQNd, key_GNd, value_GNd, self.scale, context.unseen_NN)
            return output_GQNd[0].permute(2, 0, 1, 3).flatten(1)
        padding, outputs = context.padding, []
        batches = padding.pad(qkv_NGXd).split([rows * length for rows, length in padding.shapes])
        for batch, (rows, length) in zip(batches, padding.shapes, strict=True):
            qkv_BGXSd = batch.view(rows, length, *batch.shape[1:]).permute(0, 2, 3, 1, 4)
            query_BGQSd, key_BG1Sd, value_BG1Sd = _split(qkv_BGXSd)
            output_BGQSd = product(query_BGQSd, key_BG1Sd.squeeze(2), value_BG1Sd.squeeze(2), self.scale)
            outputs.append(output_BGQSd.permute(0, 3, 1, 2, 4).reshape(rows * length, -1))
        return padding.strip(torch.cat(outputs), context.tokens)


@lru_cache
def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's kernel runs: on NVIDIA's Ampere and later, in half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device)[0] >= 8


def _split(qkv_NGXd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, key and value along the third dimension; in the backward pass their gradients are joined once."""
    query, key, value = qkv_NGXd.split([qkv_NGXd.shape[2] - 2, 1, 1], dim=2)
    return query, key, value


def _fused(
    query_BGQSd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, scale: float, unseen_SS: Tensor | None = None
) -> Tensor:
    query_BNSd = query_BGQSd.flatten(1, 2)
    mask_SS = None if unseen_SS is None else ~unseen_SS
    output_BNSd = F.scaled_dot_product_attention(
        query_BNSd, key_BGSd, value_BGSd, mask_SS, is_causal=mask_SS is None, scale=scale, enable_gqa=True
    )
    return output_BNSd.view(query_BGQSd.shape)


def _eager(
    query_BGQSd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, scale: float, unseen_SS: Tensor | None = None
) -> Tensor:
    batch, groups, queries, length, _ = query_BGQSd.shape
    # The heads of one group share keys: fold them into the rows of one product instead of copying keys.
    scores = torch.matmul(query_BGQSd.flatten(2, 3), key_BGSd.transpose(-1, -2)).float() * scale
    if unseen_SS is None:
        unseen_SS = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.view(batch, groups, queries, length, length).masked_fill(unseen_SS, -torch.inf)
    weights = scores.softmax(dim=-1).to(value_BGSd.dtype).view(batch, groups, -1, length)
    return torch.matmul(weights, value_BGSd).view(query_BGQSd.shape)


def _flash(qkv_NGXd: Tensor, context: TokenContext | FixedTokens, scale: float) -> Tensor:
    """Torch's flash attention over sequences of any lengths. It comes in two forms: torch 2.11 cannot share keys."""
    from torch.nn.attention.varlen import varlen_attn

    query_NGQd, key_NG1d, value_NG1d = _split(qkv_NGXd)
    query_Nhd, key_NGd, value_NGd = query_NGQd.flatten(1, 2), key_NG1d.squeeze(2), value_NG1d.squeeze(2)
    accepted = inspect.signature(varlen_attn).parameters
    shares_keys = "enable_gqa" in accepted
    if not shares_keys:
        queries = query_Nhd.shape[1] // key_NGd.shape[1]
        key_NGd, value_NGd = (each.repeat_interleave(queries, dim=1) for each in (key_NGd, value_NGd))
    # A window of every token to the left and none to the right.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    options |= {"enable_gqa": True} if shares_keys else {}
    starts, longest = context.starts_B1, context.longest
    output_Nhd = varlen_attn(query_Nhd, key_NGd, value_NGd, starts, starts, longest, longest, scale=scale, **options)
    assert isinstance(output_Nhd, Tensor)
    return output_Nhd.flatten(1)
