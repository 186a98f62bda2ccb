"""One router for all, with a loss that holds the groups' mean probabilities a wanted distance apart.

For every two groups a, b (modalities, or rates) with mean probabilities over the tokens of the global batch,
``J = KL(P_a || P_b) + KL(P_b || P_a)``, and the loss is ``c (max(0, least - J) + max(0, J - most))``, in the mean over
pairs of which the batch has tokens: zero, with its gradient, inside of the band. Over modalities it asks for experts
that specialise, but not too far. Over rates with ``least = 0`` it aligns the rates, which MoME leaves to its shared
router.

Source: SMAR (arXiv 2506.06406): a regulariser on the divergence of the modalities' mean routing distributions. The form
of its band and its coefficients were not seen: those here are this project's, and so is that rates may be groups.
Text is left out by modality. Probabilities below 1e-6 count as that.
Shape suffixes: as in `mome_dist.moe.routers.base`; G groups, V views, S sums.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.group_settings import SmarSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing

LEAST_PROBABILITY = 1e-6


class SmarRouter(TopKRouter):
    """As in `TopKRouter`, with one more loss."""

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, SmarSettings)
        self.settings, self.groups = spec.settings, TokenGroups(spec.settings, spec.views)

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        routing = super().route(logits_TE, tokens)
        if not self.training or tokens is None:
            return routing
        return replace(routing, values_TS=self.groups.columns(routing.probs_TE, tokens))

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        means_GE, present_G = self.groups.means(sums_VS)
        if self.settings.by == "modality":
            speech = [number for number, name in enumerate(self.groups.names) if name != "text"]
            means_GE, present_G = means_GE[speech], present_G[speech]
        logs_GE = means_GE.clamp(min=LEAST_PROBABILITY).log()
        # (P_a - P_b) (ln P_a - ln P_b), summed over experts: both divergences at once.
        probs_GE = logs_GE.exp()
        divergence_GG = ((probs_GE[:, None] - probs_GE) * (logs_GE[:, None] - logs_GE)).sum(dim=2)
        pairs_GG = torch.triu(present_G[:, None] * present_G, diagonal=1)
        outside_GG = (self.settings.least - divergence_GG).relu() + (divergence_GG - self.settings.most).relu()
        return self.settings.loss * (outside_GG * pairs_GG).sum() / pairs_GG.sum().clamp(min=1)
