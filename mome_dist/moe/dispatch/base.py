"""What every way of bringing tokens and experts together shares: the router, and counts over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.router import Routing, route


class MatryoshkaGate(TopKGate):
    """The shared router as a DeepSpeed gate; its one parameter is ``wg.weight`` fp32 [E, H]."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, renormalize: bool) -> None:
        super().__init__(hidden_size, num_experts, k=top_k)
        self.renormalize = renormalize

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        # Set when the layer is built, since initial values depend on it, and again by the engine.
        self.ep_group = ep_group

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Routing:
        return route(F.linear(hidden_TH.float(), self.wg.weight), self.k, self.renormalize, valid_T)


class Dispatch(MOELayer):
    """A DeepSpeed MoE layer's dispatch; subclasses say what travels.

    Attributes:
        routing: of the latest forward pass.
    """

    def __init__(self, moe: MoE, gate: MatryoshkaGate, experts: Experts) -> None:
        super().__init__(gate, experts, moe.expert_group_name, moe.ep_size, moe.num_local_experts)
        self.num_experts = moe.num_experts
        self.dp_group: dist.ProcessGroup | None = None
        self.routing: Routing | None = None
        self.asked_E: Tensor | None = None
        self.dropped_E: Tensor | None = None
        self._counts_RX: Tensor | None = None
        self._counting: dist.Work | None = None

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what can be done before the hidden states (of this dtype) are there."""

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None, shared: ExpertStack | None) -> Tensor:
        """[T, H] -> [T, H], routed and shared experts added up.

        Every rank of the data-parallel group must call it the same number of times.
        """
        raise NotImplementedError

    def asked_and_dropped(self) -> tuple[Tensor, Tensor]:
        """int64 [E] each: this rank's routes of the latest pass that count, and those of them that got no slot."""
        assert self.asked_E is not None and self.dropped_E is not None, "needs a forward pass first"
        return self.asked_E, self.dropped_E

    def counts(self) -> Tensor:
        """int64 [R, E + 1]: each data-parallel rank's tokens per expert, then its number of tokens (latest pass)."""
        assert self._counts_RX is not None, "needs a forward pass first"
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
        return self._counts_RX

    def _route(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Routing:
        """Route the tokens, and start to gather the counts of all ranks."""
        self.routing = routing = self.gate(hidden_TH, valid_T)
        self.asked_E = routing.selected_TE().sum(dim=0)
        tokens = routing.probs_TE.new_tensor(hidden_TH.shape[0]) if valid_T is None else valid_T.sum()
        counts_X = torch.cat([self.asked_E, tokens.to(self.asked_E.dtype)[None]])
        if self.dp_group is None or dist.get_world_size(self.dp_group) == 1:
            self._counts_RX = counts_X[None]
        else:
            flat = counts_X.new_empty(dist.get_world_size(self.dp_group) * counts_X.numel())
            self._counting = dist.all_gather_into_tensor(flat, counts_X, group=self.dp_group, async_op=True)
            self._counts_RX = flat.view(-1, counts_X.numel())
        return routing
