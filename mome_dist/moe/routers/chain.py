"""A chain: tokens pass through the same experts several times, each time with a gate of its own.

``x_0 = h``, ``x_{t+1} = x_t + MoE_t(x_t)`` for C passes, and the module adds ``x_C - h``: nothing at first, since every
pass begins as nothing, and later passes read what earlier ones found. MoE_t has the experts of all passes, the shared
ones too, and a linear map of its own as router. With C = 1 it is MoME, bit by bit; with K C experts a token in all it
costs what MoME with as many does, C passes after one another, and under `alltoall` C exchanges.

The balance loss is that of the passes together, since they load the same experts: of their routes, and of the mean of
their probabilities. So is a bias of the choice.
Source: Chain-of-Experts (arXiv 2506.18945), with its inner residual connection; that it lies beside a frozen layer and
gives the difference, and how it is balanced, is this project's.
Shape suffixes: as in `mome_dist.moe.routers.base`; C passes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.packed_module import PackedTensor


class ChainRouter(Router):
    """As in `Router`, with a map for each pass.

    Attributes:
        packed: fp32 [C * E * H], the map of one pass after the other, saved as ``weight.PASS``, [E, H] each.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        self.packed = nn.Parameter(torch.empty(self.passes * experts * hidden_size))

    def tensors(self) -> Iterator[PackedTensor]:
        size = self.experts * self.hidden_size
        for number in range(self.passes):
            yield PackedTensor(f"weight.{number}", self.packed, number * size, (self.experts, self.hidden_size))
        yield from self.states()

    def logits(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> Tensor:
        return F.linear(hidden_TH.float(), self.packed.view(self.passes, self.experts, -1)[self.turn])

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.packed.view(-1, self.hidden_size)

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        return products_TR[:, self.turn * self.experts : (self.turn + 1) * self.experts]
