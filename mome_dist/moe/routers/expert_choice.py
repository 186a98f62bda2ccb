"""Experts choose tokens: each takes the speech tokens of an utterance that suit it best, the same number as all others.

Of the T speech tokens of one sequence, every expert takes the ``C = ceil(K T / N)`` with the largest ``S_te``, a
softmax over the experts; S is the gate. So the experts of an utterance are in even use without a loss, a token has K
experts in the mean, and between none (the shared expert is left) and all of them. At equal scores the earlier token
goes first. Text (words, prompt, tags) goes to the K best experts of each token, with the same gates.

Decoding chooses as training does: speech is a prefix that is read as a whole, and no later token joins the pool. Nor
does what lies beside it in a batch. The tokens of a sequence must be on one rank: sequence parallelism cuts them.

Source: Expert Choice (arXiv 2202.09368): C, scores and gates as published. Its pool is a batch; that it is the speech
of one utterance, that text chooses for itself and that K is the mean number (theirs is 2) is this project's.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing
from mome_dist.token_context import Modality


class ExpertChoiceRouter(TopKRouter):
    """As in `TopKRouter`, but that routings have E columns where there may be speech."""

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best = super().route(logits_TE, tokens)
        if tokens is None or tokens.modality_N is None:
            return best
        speech_N = tokens.modality_N != Modality.TEXT
        pool_N = tokens.once("pools", lambda: 2 * tokens.sequence_N + speech_N)
        sorted_N = tokens.once("sorted pools", lambda: pool_N.sort().values)
        first_N = tokens.once("first of pools", lambda: torch.searchsorted(sorted_N, pool_N))
        sizes_N = tokens.once("sizes of pools", lambda: torch.searchsorted(sorted_N, pool_N, right=True) - first_N)
        taken_N1 = (self.top_k * sizes_N + self.experts - 1)[:, None] // self.experts
        places_NE = pool_places(best.probs_TE.detach(), pool_N)
        best_TE = torch.zeros_like(best.probs_TE, dtype=torch.bool).scatter_(1, best.experts_TK, True)
        chosen_TE = torch.where(speech_N[:, None], places_NE - first_N[:, None] < taken_N1, best_TE)
        gates_TE = best.probs_TE * chosen_TE
        return replace(
            best,
            experts_TK=torch.arange(self.experts, device=logits_TE.device).expand_as(gates_TE).contiguous(),
            gates_TK=gates_TE if best.valid_T is None else gates_TE * best.valid_T[:, None],
            chosen_TK=chosen_TE,
        )


def pool_places(scores_TE: Tensor, pool_T: Tensor) -> Tensor:
    """int64 [T, E], the place of each token among all, pool by pool and in each by falling score of an expert."""
    order_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
    order_TE = order_TE.gather(0, pool_T[order_TE].argsort(dim=0, stable=True))
    index_TE = torch.arange(len(pool_T), device=pool_T.device)[:, None].expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(0, order_TE, index_TE)
