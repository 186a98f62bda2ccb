"""Null experts, which cost nothing and give nothing, compete with the real ones: tokens use unequal numbers of these.

Of E real and M null experts, a token chooses the K best logits (`mome.top_k`); gates are a softmax over the real ones
among them. A token that chose nulls alone gets the shared expert alone. The load-balance loss holds the mean number of
real experts near ``K E / (E + M)``: ``(E + M) (sum over real e of f_e P_e + f_0 sum over nulls of P_n)``, where f are
shares of all K choices, P mean probabilities among all E + M, and f_0 is the nulls' mean share, so that it tells none
of them apart. The first part is the balance loss of every router, whose shares are of the real choices: equal where
their mean number is as above. The second part is a loss of its own.

Source: AdaMoE (arXiv 2406.13233): nulls, larger K and gates as in the released code, and so is the loss over all E + M,
up to a factor K: it has shares of tokens. The mean over nulls is recalled from the paper; the code takes a mean over
tokens in its place, which changes nothing, and counts 8 real experts whatever there are. That the two parts have a
coefficient each is this project's; equal ones are published.
Shape suffixes: as in `mome_dist.moe.routers.base`; M null experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.registry import NullSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing, masked_gates


class NullRouter(Router):
    """As in `Router`; its logits are [T, E + M].

    Attributes:
        rows: fp32 [E + M, H], of the real experts first. Not called weight: that has as many rows as there are experts.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, NullSettings)
        self.settings = spec.settings
        self.rows = nn.Parameter(torch.empty(experts + spec.settings.nulls, hidden_size))

    @property
    def mean_top_k(self) -> float:
        return self.top_k * self.experts / (self.experts + self.settings.nulls)

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.rows

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best_TK = logits_TE.topk(self.top_k, dim=-1)
        chosen_TK = best_TK.indices < self.experts
        gates_TK = masked_gates(best_TK.values, chosen_TK)
        experts_TK = best_TK.indices.where(chosen_TK, 0)
        valid_T = None if tokens is None else tokens.alive_N
        if valid_T is not None:
            gates_TK = gates_TK * valid_T[:, None]
        probs_TE, of_nulls_TM = logits_TE.softmax(dim=-1).tensor_split([self.experts], dim=-1)
        nulls_T = (~chosen_TK).sum(dim=-1, dtype=torch.float32)
        values_TS = torch.stack([of_nulls_TM.sum(dim=-1), nulls_T], dim=1)
        logits_TE = logits_TE[:, : self.experts]
        return Routing(experts_TK, gates_TK, probs_TE, logits_TE, valid_T, chosen_TK, values_TS)

    def batch_loss(self, sums_VS: Tensor, tokens_V: Tensor) -> Tensor:
        """``(E + M) f_0 P_0``, in the mean over views, times its coefficient."""
        nulls = self.settings.nulls
        probability_V, chosen_V = sums_VS.unbind(dim=1)
        share_V = chosen_V.detach() / (max(nulls, 1) * self.top_k * tokens_V)
        return self.settings.null_loss * (self.experts + nulls) * (share_V * probability_V / tokens_V).mean()
