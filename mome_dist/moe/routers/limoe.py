"""One router for all modalities, each of which is to be sure by token and to use several experts in the whole.

Beside the K best of ``P = softmax(W h)``, the loss is, summed over modalities m with tokens t of the global batch,
``a * mean_t H(P_t) + b * max(0, ln S - H(mean_t P_t))`` with the entropy H in nats: the first makes each token sure,
the second spreads each modality over at least S experts.

Source: LIMoE (arXiv 2206.02770), local and thresholded global entropy; its formulas are recalled, not checked, and so
is the coefficient 0.04 that both have here. S = K is this project's choice, and so is that text is a modality beside
audio and video. LIMoE drops tokens by priority over the batch; here none is dropped.
Shape suffixes: as in `mome_dist.moe.routers.base`; G modalities, V views, S sums.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.group_settings import GroupedSettings, LimoeSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing, entropy


class LimoeRouter(TopKRouter):
    """As in `TopKRouter`, with two more losses."""

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, LimoeSettings)
        self.settings = spec.settings
        self.groups = TokenGroups(GroupedSettings("modality"), spec.views)

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        routing = super().route(logits_TE, tokens)
        if not self.training or tokens is None:
            return routing
        values_TX = torch.cat([routing.probs_TE, entropy(routing.logits_TE)[:, None]], dim=1)
        return replace(routing, values_TS=self.groups.columns(values_TX, tokens))

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        means_GX, present_G = self.groups.means(sums_VS)
        probs_GE, local_G = means_GX.split([self.experts, 1], dim=1)
        spread_G = -torch.special.xlogy(probs_GE, probs_GE.clamp(min=1e-9)).sum(dim=1)
        least = math.log(self.settings.least_experts or self.top_k)
        local, spread = self.settings.local_loss, self.settings.global_loss
        loss_G = local * local_G[:, 0] + spread * (least - spread_G).relu()
        return (loss_G * present_G).sum()
