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

from mome_dist.moe.columns import unpack
from mome_dist.moe.dispatch.base import Dispatch, Gate
from mome_dist.moe.dispatch.exchange import Exchange, all_gather
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.triton.experts import kernel_experts, runs_as_one_kernel
from mome_dist.token_context import TokenContext


class GatherDispatch(Dispatch):
    """Dispatch by gathering weights. The gathered copy, in the precision of the hidden states, lives until the
    layer's backward pass."""

    def __init__(self, moe: MoE, gate: Gate, experts: RoutedExperts) -> None:
        super().__init__(moe, gate, experts)
        self._exchange: Exchange | None = None
        self._held_EP: Tensor | None = None  # between the passes of a chain

    def prefetch(self, dtype: torch.dtype) -> None:
        if self.ep_size > 1:
            self._exchange = all_gather(self.ep_group, dtype)
            self._exchange.start(self.experts.packed.flatten())

    def forward(
        self, hidden_TH: Tensor, inside_TD: Tensor, context: TokenContext, shared: ExpertStack | None
    ) -> Tensor:
        router, experts = self.router, self.num_experts + (len(shared) if shared is not None else 0)
        form = router.kernel_form if self.experts.form.kernel else None
        if form is None or not runs_as_one_kernel(hidden_TH, experts):
            self.routing = routing = router(hidden_TH, context)
            packed_EP = self._packed(hidden_TH.dtype)
            weights = unpack(packed_EP, self.experts.shapes, packed_EP.dtype)
            of_shared = None if shared is None else shared.weights()
            return self.experts.form.dense(inside_TD, weights, routing.gates_TE(), of_shared)
        output_TH, self.routing = kernel_experts(
            hidden_TH,
            router.logits(hidden_TH, context),
            self._packed(hidden_TH.dtype),
            self.experts.shapes,
            shared,
            context,
            **form._asdict(),
        )
        return output_TH

    def _packed(self, dtype: torch.dtype) -> Tensor:
        """All experts, [E, P]: as they are where nothing travels, for they are cast where they are joined."""
        if self.ep_size == 1:
            return self.experts.packed
        packed_EP = self._held_EP
        if packed_EP is None or not self.router.turn:
            if self._exchange is None:
                self.prefetch(dtype)
            exchange, self._exchange = cast(Exchange, self._exchange), None
            packed_EP = exchange.finish().view(self.num_experts, -1)
        self._held_EP = packed_EP if self.router.turn + 1 < self.router.passes else None
        return packed_EP
