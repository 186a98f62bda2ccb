"""What every way of bringing tokens and experts together shares: the router, where DeepSpeed has its gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.routers.base import Router
from mome_dist.moe.routing import Routed
from mome_dist.packed_module import loaded_from
from mome_dist.token_context import TokenContext


class Gate(nn.Module):
    """A router in the place of DeepSpeed's gate.

    Attributes:
        wg: the router, called as the one linear map of that gate is.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.wg = router
        loaded_from(self, "bias_E", "wg.bias")  # engines wrote it so

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        # Set when the layer is built, since initial values depend on it, and again by the engine.
        self.ep_group = ep_group


class Dispatch(MOELayer):
    """A DeepSpeed MoE layer's dispatch; subclasses say what travels.

    Attributes:
        routing: of the latest forward pass.
    """

    def __init__(self, moe: MoE, gate: Gate, experts: RoutedExperts) -> None:
        super().__init__(gate, experts, moe.expert_group_name, moe.ep_size, moe.num_local_experts)
        self.num_experts = moe.num_experts
        self.token_group: dist.ProcessGroup | None = None
        self.routing: Routed | None = None

    @property
    def router(self) -> Router:
        """The router of the layer."""
        return self.gate.wg

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what can be done before the hidden states (of this dtype) are there."""

    @property
    def tokens_travel(self) -> bool:
        """Whether `begin` starts something."""
        return False

    def begin(
        self, hidden_TH: Tensor, inside_TD: Tensor, context: TokenContext, shared: ExpertStack | None
    ) -> Callable[[], Tensor]:
        """Start what travels as soon as tokens are there; what is returned gives what `forward` does, and is called
        once."""
        return partial(self, hidden_TH, inside_TD, context, shared)

    def forward(
        self, hidden_TH: Tensor, inside_TD: Tensor, context: TokenContext, shared: ExpertStack | None
    ) -> Tensor:
        """Routed and shared experts added up, [T, D]; no routed expert sees a dead token.

        Every rank of the token group must call it the same number of times.

        Args:
            hidden_TH: [T, H], what the router reads.
            inside_TD: [T, D], what experts read and what travels: the same, unless experts have something in common
                (`mome_dist.moe.forms.base.ExpertForm.enter`).
        """
        raise NotImplementedError

    def kept(self) -> Tensor | None:
        """Bool [T, K], the routes of the latest forward pass that an expert took; None if none can be dropped."""
        return None
