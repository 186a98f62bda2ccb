"""Experts until they are probable enough together: a token whose router is unsure uses more of them.

With probabilities ``P = softmax(W h)`` in falling order, a token uses the first k, the least number with
``P_1 + ... + P_k > p``, but at most K (`mome.top_k`); their gates are their probabilities as they are. Two losses keep
k small and experts in use: ``mean over tokens of -sum_e P_e ln P_e``, without which the router flattens its
probabilities until all experts are used, and the balance loss that every router has.

Source: Harder Tasks Need More Experts (arXiv 2403.07652). The choice, with the expert that crosses p, and p = 0.4 are
those of the released code, which has no training in it; the loss has the form that a survey of dynamic routing quotes,
its coefficient 1e-4 is recalled from the paper and not checked. The bound K is this project's: it is what buffers and
plans are sized for.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.balance import TokenLoss
from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.registry import TopPSettings
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing, entropy


class TopPRouter(TopKRouter):
    """As in `TopKRouter`, but for the choice."""

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        assert isinstance(self.spec.settings, TopPSettings)
        best = super().route(logits_TE, tokens)
        before_TK = F.pad(best.probs_TE.gather(1, best.experts_TK).cumsum(dim=1)[:, :-1], (1, 0))
        chosen_TK = before_TK <= self.spec.settings.p
        return replace(best, gates_TK=best.gates_TK * chosen_TK, chosen_TK=chosen_TK)

    def losses(self, routing: Routing) -> Sequence[TokenLoss]:
        assert isinstance(self.spec.settings, TopPSettings)
        return [TokenLoss(self.spec.settings.entropy_loss, entropy(routing.logits_TE))]
