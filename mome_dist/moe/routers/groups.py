"""Experts of one group of tokens alone: other groups' experts have no score for a token, and get no gradient from it.

``P = softmax over the experts of the token's group of W h``; then the K best of these, all if the group has fewer. The
experts are dealt out to the groups in turn, so that expert-parallel ranks, which hold experts in order, hold some of
every group however many tokens each has. By modality, text (words, prompt, tags, and what is written) has a group too.
With ``visible``, groups are not disjoint: each sees so many experts, drawn from its name.

Source: MoMa (arXiv 2407.21770) for modality groups, with sigmoid scores and expert choice inside of a group; this
project chooses by token, so that nothing depends on neighbours (`mome.score=sigmoid` is its score). MaskMoE (arXiv
2407.09816) for fixed masks, by how often a word occurs; here by what a group is of. EVE (arXiv 2308.11971) has a router
of its own for each modality and all experts: that is `separate`. Mechanics of all three are recalled, not checked.
Shape suffixes: as in `mome_dist.moe.routers.base`; G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mome_dist.moe.routers.base import RoutedTokens
from mome_dist.moe.routers.group_settings import GroupsSettings
from mome_dist.moe.routers.hashed import drawn_experts
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routers.token_groups import TokenGroups
from mome_dist.moe.routers.top_k import TopKRouter
from mome_dist.moe.routing import Routing


class GroupsRouter(TopKRouter):
    """As in `TopKRouter`, but that it sees a part of the experts.

    Attributes:
        visible_GE: bool [G, E], the experts of each group; not saved.
    """

    visible_GE: Tensor

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, GroupsSettings)
        self.groups = TokenGroups(spec.settings, spec.views)
        number, visible = len(self.groups.names), spec.settings.visible
        if visible is None:
            dealt_E = torch.arange(experts, device="cpu") % number
            visible_GE = dealt_E == torch.arange(number, device="cpu")[:, None]
        else:
            drawn = drawn_experts(self.groups.names, experts, visible)
            visible_GE = torch.zeros(number, experts, dtype=torch.bool, device="cpu").scatter_(1, drawn, True)
        self.register_buffer("visible_GE", visible_GE, persistent=False)

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        seen_TE = self.groups.rows(self.visible_GE, tokens).expand_as(logits_TE)
        lowest = torch.finfo(logits_TE.dtype).min
        best = super().route(logits_TE.masked_fill(~seen_TE, lowest), tokens)
        chosen_TK = seen_TE.gather(1, best.experts_TK)
        return replace(best, gates_TK=best.gates_TK * chosen_TK, chosen_TK=chosen_TK)
