"""Weights travel: experts and their optimiser state stay sharded, and each layer's weights visit every rank.

A MoME expert is tiny and its tokens are wide, so its weights are far fewer bytes than the tokens it sees. They are
gathered while the frozen layer computes, every rank runs all experts on its own tokens as two matrix products, and the
gradients are reduced and scattered back during the frozen layer's backward pass. Nothing is ever dropped. With one
expert-parallel rank nothing travels at all.
Source: the idea of fully sharded data parallelism for sparse layers (Hecate).
"""

from __future__ import annotations

from typing import cast

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor

from mome_dist.moe.dispatch.base import Dispatch, MatryoshkaGate
from mome_dist.moe.dispatch.exchange import Exchange, all_gather
from mome_dist.moe.experts import ExpertStack, dense_experts
from mome_dist.moe.routed import RoutedExperts, unpack


class GatherDispatch(Dispatch):
    """Dispatch by gathering weights. The gathered copy, in the precision of the hidden states, lives until the
    layer's backward pass."""

    def __init__(self, moe: MoE, gate: MatryoshkaGate, experts: RoutedExperts) -> None:
        super().__init__(moe, gate, experts)
        self._exchange: Exchange | None = None

    def prefetch(self, dtype: torch.dtype) -> None:
        if self.ep_size > 1:
            self._exchange = all_gather(self.ep_group, dtype)
            self._exchange.start(self.experts.packed.flatten())

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None, shared: ExpertStack | None) -> Tensor:
        self.routing = routing = self.gate(hidden_TH, valid_T)
        if self.ep_size == 1:
            weights = self.experts.weights(self.experts.packed.dtype)  # cast where they are joined
        else:
            if self._exchange is None:
                self.prefetch(hidden_TH.dtype)
            exchange, self._exchange = cast(Exchange, self._exchange), None
            packed_EP = exchange.finish().view(self.num_experts, -1)
            weights = unpack(packed_EP, self.experts.shapes, hidden_TH.dtype)
        return dense_experts(hidden_TH, weights, routing.gates_TE(), shared)
