"""Losses that keep the routed experts in use: the Switch load-balance loss and the router z-loss.

Both are means over the tokens of the global batch, not of one shard: with ``global_counts`` and ``global_tokens``
summed over the data-parallel ranks, the sum over ranks of what `load_balance_loss` returns equals the loss of the whole
batch in one process, and so do its gradients. The count of tokens per expert carries no gradient, which is why no
collective is needed in the backward pass.
Source: Switch Transformer (arXiv 2101.03961) equations 4-6; ST-MoE (arXiv 2202.08906) equation 5 for the z-loss.
"""

from __future__ import annotations

from torch import Tensor

from mome_dist.moe.router import Routing


def _masked_sum(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum over valid tokens of a per-token quantity [T] or [T, E]."""
    if valid_T is None:
        return values_T.sum(dim=0)
    mask = valid_T if values_T.dim() == 1 else valid_T[:, None]
    return (values_T * mask).sum(dim=0)


def load_balance_loss(routing: Routing, global_counts_E: Tensor, global_tokens: Tensor) -> Tensor:
    """This rank's part of ``E * sum_e f_e P_e``; 1.0 over all ranks when perfectly balanced.

    Args:
        routing: this rank's tokens.
        global_counts_E: [E], tokens of all ranks that chose each expert, before any drop.
        global_tokens: scalar, valid tokens of all ranks.
    """
    num_experts, top_k = routing.probs_TE.shape[1], routing.experts_TK.shape[1]
    tokens = global_tokens.clamp(min=1).float()
    fraction_E = global_counts_E.float() / (top_k * tokens)
    probability_E = _masked_sum(routing.probs_TE, routing.valid_T) / tokens
    return num_experts * (fraction_E * probability_E).sum()


def router_z_loss(routing: Routing, global_tokens: Tensor) -> Tensor:
    """This rank's part of the mean over tokens of ``logsumexp(logits)^2``."""
    squared_T = routing.logits_TE.float().logsumexp(dim=-1).square()
    return _masked_sum(squared_T, routing.valid_T) / global_tokens.clamp(min=1).float()
