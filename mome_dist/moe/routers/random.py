"""Random experts: what a learned choice is compared with.

A random linear map, drawn once from the seed and never trained, ranks the experts; a token uses the K best, each with a
gate of 1 / K. So the choice is a fixed function of the token's hidden state: equal in every layout, in evaluation as in
training, alike for like tokens. A bias that follows the load (`mome.bias_rate`) still balances it; no loss does. With
`mome.router.anew`, training draws K experts for every token of every pass in its place, the same in every layout
(`mome_dist.draws`).

Source: random routing as a control is that of THOR (arXiv 2110.04260), which draws anew for every pass, also in
evaluation, and penalises what two passes differ in. A fixed map is this project's choice, also in the evaluation of
what was trained with draws, and so is the lack of a second pass.
Shape suffixes: as in `mome_dist.moe.routers.base`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mome_dist.draws import uniforms
from mome_dist.moe.routers.base import RoutedTokens, Router, initial_map
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.moe.routing import Routing


class RandomRouter(Router):
    """As in `Router`; nothing in it trains.

    Attributes:
        map: fp32 [E, H].
    """

    map: Tensor

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        self.register_buffer("map", torch.zeros(experts, hidden_size))

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        super().initialize(prefix, seed)
        self.map.copy_(initial_map(f"{prefix}.router_map", tuple(self.map.shape), seed))

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        if self.training and self.spec.settings.draws:
            return uniforms(*self.draws(tokens, 0), self.experts)
        # Not by `maps`, of which copies are kept until a parameter changes: this is none.
        return F.linear(hidden_TH.float(), self.map)

    def route(self, logits_TE: Tensor, tokens: RoutedTokens | None) -> Routing:
        best = super().route(logits_TE, tokens)
        gates_TK = torch.full_like(best.gates_TK, 1 / self.top_k)
        return replace(best, gates_TK=gates_TK if best.valid_T is None else gates_TK * best.valid_T[:, None])
