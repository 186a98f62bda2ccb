"""First a group of experts, then an expert in it: an expert's probability is the product of both.

``P_e = p_i q_e`` with ``p = softmax(V h)`` over the groups and q the softmax of ``U h`` over the experts of e's group
i; then the K best products, of the `top_groups` most probable groups alone if that is set. Groups are of neighbours by
number, and the configuration's, not the machine's: a checkpoint knows no layout. With one group, or one expert in each,
it is `top_k`: the level that has no choice has no map. Each level has a balance loss: that of every router, of the
products, and ``n sum_i f_i p_i`` over the n groups, f_i the share of choices, in the mean over views.

Source: SMILE (arXiv 2212.05191), where groups are nodes, and one group and one expert in it are chosen; losses
recalled, not checked. Logits are ``ln P``, and what the softmaxes divide by, for the z-loss: that is this project's.
Shape suffixes: as in `mome_dist.moe.routers.base`; G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.registry import BilevelSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing


class BilevelRouter(Router):
    """As in `Router`.

    Attributes:
        rows: fp32 [G + E, H], of groups, then of experts, as far as there is a choice. Not called weight: that has as
            many rows as there are experts.
        group_E: int64 [E], the group of each expert; not saved.
    """

    group_E: Tensor

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, BilevelSettings)
        self.settings, self.number = spec.settings, spec.settings.groups
        self.rows = nn.Parameter(torch.empty(spec.settings.outputs(experts, ()), hidden_size))
        group_E = torch.arange(experts, device="cpu") * self.number // experts
        self.register_buffer("group_E", group_E, persistent=False)

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.rows

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        if self.number in (1, self.experts):
            return products_TR
        of_groups_TG, of_experts_TE = products_TR.split([self.number, self.experts], dim=1)
        other_GE = self.group_E != torch.arange(self.number, device=self.group_E.device)[:, None]
        sizes_TG = of_experts_TE[:, None].masked_fill(other_GE, -torch.inf).logsumexp(dim=2)
        size_T1 = of_groups_TG.logsumexp(dim=1, keepdim=True)
        both_T1 = size_T1 + ((of_groups_TG - size_T1).exp() * sizes_TG).sum(dim=1, keepdim=True)
        return (of_groups_TG - size_T1 - sizes_TG)[:, self.group_E] + of_experts_TE + both_T1

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best = super().route(logits_TE, tokens)
        of_group_EG = F.one_hot(self.group_E, self.number).float()
        probs_TG = best.probs_TE @ of_group_EG
        if self.settings.top_groups is not None:
            allowed_TG = torch.zeros_like(probs_TG).scatter_(1, probs_TG.topk(self.settings.top_groups).indices, 1.0)
            lowest = torch.finfo(logits_TE.dtype).min
            chosen = super().route(logits_TE.masked_fill((allowed_TG @ of_group_EG.t()) == 0, lowest), tokens)
            gates_TK = best.probs_TE.gather(1, chosen.experts_TK)
            gates_TK = gates_TK if best.valid_T is None else gates_TK * best.valid_T[:, None]
            gates_TK = chosen.gates_TK if self.spec.renormalize else gates_TK
            best = replace(best, experts_TK=chosen.experts_TK, gates_TK=gates_TK)
        chosen_TG = of_group_EG[best.experts_TK].sum(dim=1)
        return replace(best, values_TS=torch.cat([probs_TG, chosen_TG], dim=1))

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        probs_VG, chosen_VG = sums_VS.chunk(2, dim=1)
        shares_VG = chosen_VG.detach() / (self.top_k * tokens_V[:, None])
        return self.settings.group_loss * self.number * (shares_VG * probs_VG / tokens_V[:, None]).sum(dim=1).mean()
