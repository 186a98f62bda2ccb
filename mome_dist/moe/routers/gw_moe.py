"""The K best experts, and in training all of them for a token whose router does not know.

A token is unsure if the entropy ``H(P) = -sum_e P_e ln P_e`` exceeds a share of its maximum ln N. In training it goes
to all N experts with P for gates; others go to the K best, as in `top_k`. In evaluation all do, and it costs nothing
there: experts have learned what unsure tokens need, whichever of them is chosen. With a share of 1 this is `top_k`,
with 0 the soft mixture of all experts.

Every expert's output must be there, which `mome.dispatch=local` and `gather` have anyway; under `alltoall` a rank would
have to be ready for N experts a token.

Source: GW-MoE (arXiv 2406.12375): all experts above a threshold of the entropy, P for gates, K best in evaluation. Its
released code has the threshold in nats and a bound on the unsure tokens of a sequence, which would let neighbours
decide and is left out here; and it multiplies P with the token, not with what experts say of it, which is taken for a
mistake. The threshold as a share of ln N is this project's.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.registry import WorkspaceSettings
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing, entropy


class WorkspaceRouter(TopKRouter):
    """As in `TopKRouter`, but that routings of training have E columns."""

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best = super().route(logits_TE, tokens)
        if not self.training:
            return best
        assert isinstance(self.spec.settings, WorkspaceSettings)
        most = math.log(self.experts)
        # In fp32 the entropy of even probabilities may be a little more than ln N.
        unsure_T1 = entropy(best.logits_TE).clamp(max=most)[:, None] > self.spec.settings.threshold * most
        probs_TE = best.probs_TE if best.valid_T is None else best.probs_TE * best.valid_T[:, None]
        best_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, best.experts_TK, True)
        return replace(
            best,
            experts_TK=torch.arange(self.experts, device=logits_TE.device).expand_as(probs_TE).contiguous(),
            gates_TK=torch.where(unsure_T1, probs_TE, best.gates_TE()),
            chosen_TK=best_TE | unsure_T1,
        )
