"""One linear map for all tokens, and the K best experts: the router that all Matryoshka rates and modalities share.

Source: MoME (arXiv 2510.04136) with softmax scores; DeepSeek-V3 (arXiv 2412.19437) with sigmoid scores and a bias. See
`mome_dist.moe.routing` for the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.spec import RouterSpec


class TopKRouter(Router):
    """As in `Router`.

    Attributes:
        weight: fp32 [E, H].
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.weight
