"""Several routers, mixed for each token by a main one.

``P = sum over j of m_j softmax(W_j h)`` with ``m = softmax(W_m h)`` over the R sub-routers; then the K best, and the
losses of every router, of P. Logits are ``ln P`` and, so that the z-loss has something to hold, the mean with weights m
of the sub-routers' ``logsumexp(W_j h)``, which no choice and no gate sees: equal sub-routers are `top_k` in everything.

Source: Mixture of Routers (arXiv 2503.23362), its form recalled, not checked; what the z-loss is of is this project's.
Shape suffixes: as in `mome_dist.moe.routers.base`; S sub-routers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mome_dist.moe.routers.base import RoutedTokens, Router
from mome_dist.moe.routers.registry import MixtureSettings
from mome_dist.moe.routers.spec import RouterSpec
from mome_dist.packed_module import PackedTensor


class MixtureRouter(Router):
    """As in `Router`.

    Attributes:
        packed: fp32 [(S E + S) * H], every sub-router, saved as ``weight.NUMBER``, then the main router, ``mixing``.
    """

    def __init__(self, spec: RouterSpec, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__(spec, hidden_size, experts, top_k)
        assert isinstance(spec.settings, MixtureSettings)
        self.sub_routers = spec.settings.sub_routers
        self.packed = nn.Parameter(torch.empty(self.sub_routers * (1 + experts) * hidden_size))

    def maps(self, tokens: RoutedTokens | None) -> Tensor:
        return self.packed.view(-1, self.hidden_size)

    def logits_of(self, products_TR: Tensor, tokens: RoutedTokens | None) -> Tensor:
        mixing_TS1 = products_TR[:, -self.sub_routers :].log_softmax(dim=1)[:, :, None]
        logits_TSE = products_TR[:, : -self.sub_routers].unflatten(1, (self.sub_routers, -1))
        sizes_TS1 = logits_TSE.logsumexp(dim=2, keepdim=True)
        size_T1 = (mixing_TS1.exp() * sizes_TS1).sum(dim=1)
        return (mixing_TS1 + logits_TSE - sizes_TS1).logsumexp(dim=1) + size_T1

    def tensors(self) -> Iterator[PackedTensor]:
        size = self.experts * self.hidden_size
        for number in range(self.sub_routers):
            yield PackedTensor(f"weight.{number}", self.packed, number * size, (self.experts, self.hidden_size))
        yield PackedTensor("mixing", self.packed, self.sub_routers * size, (self.sub_routers, self.hidden_size))
        yield from self.states()
