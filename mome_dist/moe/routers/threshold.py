"""Every expert whose cosine with a token passes the expert's own threshold: tokens use unequal numbers of them.

``s_e = sigmoid(tau cos(h, w_e))``; an expert is active if ``s_e > sigmoid(tau G_e)``, that is, if the cosine exceeds
G_e, which is learned and zero at first. A token's output is the mean of its active experts; the gates' gradient passes
straight through the comparison, as if the gate were ``relu(s_e - sigmoid(tau G_e))``. The loss keeps directions apart
and short: ``||W_n W_n^T - I||_F + mean_e ||w_e||`` with rows of length one in W_n. Directions start orthogonal, where
the gradient of the first norm would have a length of one and a direction of nothing but rounding, other in every
layout: below 0.001 the norm is rounded off, ``sqrt(||.||^2 + c^2) - c``.

Source: DynMoE (arXiv 2405.14297), top-any gating: choice, gradient, loss, orthogonal start and tau (10 at first,
learned, at most 100) as in the released code for Tutel. Left out: its pool of experts that grows and shrinks. This
project's: the rounded norm; the loss's coefficient; at most K (`mome.top_k`) active experts a token, those furthest
above their thresholds; and a token without any uses the nearest one in training too, where theirs gets nothing, so that
evaluation is what was trained.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.balance import TokenLoss
from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.registry import ThresholdSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing

FIRST_SCALE, MOST_SCALE = 10.0, 100.0  # tau
ROUNDED = 1e-3  # c


class ThresholdRouter(Router):
    """As in `Router`.

    Attributes:
        directions: fp32 [E, H], w.
        scale_change: fp32 [1], the logarithm of how many times tau is what it was at first.
        thresholds: fp32 [E], G.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, ThresholdSettings)
        self.settings = spec.settings
        self.directions = nn.Parameter(torch.empty(experts, hidden_size))
        self.scale_change = nn.Parameter(torch.empty(1))
        self.thresholds = nn.Parameter(torch.empty(experts))

    def _scale(self) -> Tensor:
        return FIRST_SCALE * self.scale_change.clamp(max=math.log(MOST_SCALE / FIRST_SCALE)).exp()

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        # Not by `maps`: of products alone, nobody knows how long the token is.
        cosines_TE = F.linear(F.normalize(hidden_TH.float(), dim=-1), F.normalize(self.directions, dim=-1))
        return cosines_TE * self._scale()

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        margins_TE = logits_TE.sigmoid() - (self._scale() * self.thresholds).sigmoid()
        margins_TK, experts_TK = margins_TE.topk(self.top_k, dim=-1)
        first_K = torch.arange(self.top_k, device=logits_TE.device) == 0
        chosen_TK = (margins_TK > 0) | first_K
        through_TK = margins_TK.relu()
        gates_TK = (chosen_TK + through_TK - through_TK.detach()) / chosen_TK.sum(dim=-1, keepdim=True)
        valid_T = None if tokens is None else tokens.alive_N
        if valid_T is not None:
            gates_TK = gates_TK * valid_T[:, None]
        return Routing(experts_TK, gates_TK, logits_TE.softmax(dim=-1), logits_TE, valid_T, chosen_TK)

    def losses(self, routing: Routing) -> Sequence[TokenLoss]:
        unit_EH = F.normalize(self.directions, dim=-1)
        overlap_EE = unit_EH @ unit_EH.t() - torch.eye(self.experts, device=unit_EH.device)
        diversity = (overlap_EE.square().sum() + ROUNDED**2).sqrt() - ROUNDED
        loss = diversity + self.directions.norm(dim=-1).mean()
        return [TokenLoss(self.settings.loss, loss.expand(len(routing.logits_TE)))]  # whose mean over tokens it is

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        if not name.endswith("directions"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) ^ seed)
        return nn.init.orthogonal_(torch.empty(shape), generator=generator)
