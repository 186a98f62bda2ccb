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
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from torch import Tensor

from mome_dist.moe.dispatch.base import Dispatch, MatryoshkaGate
from mome_dist.moe.dispatch.exchange import Exchange, all_gather
from mome_dist.moe.experts import Bottleneck, ExpertStack, ExpertWeights, dense_experts, stack_weights


class GatherDispatch(Dispatch):
    """Dispatch by gathering weights. The gathered copy, in the precision of the hidden states, lives until the
    layer's backward pass."""

    def __init__(self, moe: MoE, gate: MatryoshkaGate, experts: Experts) -> None:
        super().__init__(moe, gate, experts)
        self._exchange: Exchange | None = None

    def prefetch(self, dtype: torch.dtype) -> None:
        if self.ep_size > 1:
            self._exchange = all_gather(self.ep_group, dtype)
            self._exchange.start(self._packed())

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None, shared: ExpertStack | None) -> Tensor:
        routing = self._route(hidden_TH, valid_T)
        if self.ep_size == 1:
            weights = stack_weights(self.experts.deepspeed_experts, hidden_TH.dtype)
        else:
            if self._exchange is None:
                self.prefetch(hidden_TH.dtype)
            exchange, self._exchange = cast(Exchange, self._exchange), None
            weights = self._unpacked(exchange.finish())
        return dense_experts(hidden_TH, weights, routing.gates_TE(), shared)

    def _packed(self) -> Tensor:
        """The local experts as one vector: each kind of parameter (fields of `ExpertWeights`), expert by expert."""
        return torch.cat([part.flatten() for part in stack_weights(self.experts.deepspeed_experts)])

    def _unpacked(self, packed: Tensor) -> ExpertWeights:
        """The experts of all ranks, stacked, from their packed vectors one after the other."""
        first = cast(Bottleneck, self.experts.deepspeed_experts[0])
        shapes = [(self.num_local_experts, *parameter.shape) for parameter in first.weights()]
        parts = packed.view(self.ep_size, -1).split([torch.Size(shape).numel() for shape in shapes], dim=1)
        return ExpertWeights(
            *(part.reshape(self.num_experts, *shape[1:]) for part, shape in zip(parts, shapes, strict=True))
        )
