"""What every way of bringing tokens and experts together shares: the router."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.router import Routed, Routing, route
from mome_dist.token_context import TokenContext


class MatryoshkaGate(TopKGate):
    """The shared router as a DeepSpeed gate; its one parameter is ``wg.weight`` fp32 [E, H].

    Attributes:
        bias_E: fp32 [E], added to the scores for the choice of experts; None without a bias.
    """

    bias_E: Tensor | None

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, renormalize: bool, score: str, with_bias: bool
    ) -> None:
        super().__init__(hidden_size, num_experts, k=top_k)
        self.renormalize, self.score = renormalize, score
        self.register_buffer("bias_E", torch.zeros(num_experts) if with_bias else None)

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        # Set when the layer is built, since initial values depend on it, and again by the engine.
        self.ep_group = ep_group

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """fp32 [T, E]."""
        return F.linear(hidden_TH.float(), self.wg.weight)

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Routing:
        return route(self.logits(hidden_TH), self.k, self.renormalize, valid_T, score=self.score, bias_E=self.bias_E)


class Dispatch(MOELayer):
    """A DeepSpeed MoE layer's dispatch; subclasses say what travels.

    Attributes:
        routing: of the latest forward pass.
    """

    def __init__(self, moe: MoE, gate: MatryoshkaGate, experts: RoutedExperts) -> None:
        super().__init__(gate, experts, moe.expert_group_name, moe.ep_size, moe.num_local_experts)
        self.num_experts = moe.num_experts
        self.token_group: dist.ProcessGroup | None = None
        self.routing: Routed | None = None

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what can be done before the hidden states (of this dtype) are there."""

    def forward(self, hidden_TH: Tensor, context: TokenContext, shared: ExpertStack | None) -> Tensor:
        """[T, H] -> [T, H], routed and shared experts added up; no routed expert sees a dead token.

        Every rank of the token group must call it the same number of times.
        """
        raise NotImplementedError

    def kept(self) -> Tensor | None:
        """Bool [T, K], the routes of the latest forward pass that an expert took; None if none can be dropped."""
        return None
