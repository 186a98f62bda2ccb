"""Cosines between a narrow projection of a token and a direction of each expert: how long a token is plays no part.

``logits_e = cos(W h, v_e) / tau``, W [D, H] without a bias, tau learned and at least 0.01; choice and gates are those
of all routers with scores. Frozen LLMs have a few channels a hundred times as large as others, which a linear router
mostly sees; here they count for no more than their direction.

Source: X-MoE (arXiv 2204.09179). D of half the experts and tau = 0.3 are recalled from the paper, not checked. Its
authors' code (torchscale) has D = 16 whatever the experts, no bias, and divides by no length of the token; Tutel's has
D = 256, a bias, tau = 0.5 at first, learned as a logarithm, and 1 / tau at most 100, as here. No bias is this project's
choice: with one, a token's length counts again.
Shape suffixes: as in `mome_dist.moe.routers.base`; D width of the projection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.routers.base import RoutedTokens, Router, initial_map
from mome_dist.moe.routers.registry import CosineSettings
from mome_dist.moe.routers.spec import RouterSpec

MOST_SCALE = 100.0  # of 1 / tau


class CosineRouter(Router):
    """As in `Router`.

    Attributes:
        directions: fp32 [E, D]; their lengths play no part.
        projection: fp32 [D, H].
        scale_change: fp32 [1], the logarithm of how many times 1 / tau is what it was at first.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, CosineSettings)
        width = spec.settings.width_for(experts)
        self._first_scale = 1 / spec.settings.temperature
        self.directions = nn.Parameter(torch.empty(experts, width))
        self.projection = nn.Parameter(torch.empty(width, hidden_size))
        self.scale_change = nn.Parameter(torch.empty(1))

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.projection

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        cosines_TE = F.normalize(products_TR, dim=-1) @ F.normalize(self.directions, dim=-1).t()
        most = math.log(MOST_SCALE / self._first_scale)
        return cosines_TE * (self._first_scale * self.scale_change.clamp(max=most).exp())

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.zeros(shape) if name.endswith("scale_change") else initial_map(name, shape, seed)
