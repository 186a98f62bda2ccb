"""What every way of bringing tokens and experts together shares: the router, and counts over the global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.router import Routing, route


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

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Routing:
        logits_TE = F.linear(hidden_TH.float(), self.wg.weight)
        return route(logits_TE, self.k, self.renormalize, valid_T, score=self.score, bias_E=self.bias_E)


class Dispatch(MOELayer):
    """A DeepSpeed MoE layer's dispatch; subclasses say what travels.

    Attributes:
        routing: of the latest forward pass.
        capacity: slots that each expert had for a rank's tokens in the latest forward pass; None if nothing is dropped.
    """

    def __init__(self, moe: MoE, gate: MatryoshkaGate, experts: RoutedExperts) -> None:
        super().__init__(gate, experts, moe.expert_group_name, moe.ep_size, moe.num_local_experts)
        self.num_experts = moe.num_experts
        self.token_group: dist.ProcessGroup | None = None
        self.routing: Routing | None = None
        self.capacity: int | None = None
        self._counts_RX: Tensor | None = None
        self._counting: dist.Work | None = None

    def prefetch(self, dtype: torch.dtype) -> None:
        """Start what can be done before the hidden states (of this dtype) are there."""

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None, shared: ExpertStack | None) -> Tensor:
        """[T, H] -> [T, H], routed and shared experts added up.

        Every rank of the token group must call it the same number of times.
        """
        raise NotImplementedError

    def counts(self) -> Tensor:
        """int64 [R, E + 1]: each rank's tokens per expert, then its number of tokens (latest pass)."""
        return self._gathered()[:, :-1]

    def load(self) -> tuple[Tensor, Tensor | None]:
        """Load of the latest pass over all ranks of the token group, without communication.

        Returns:
            int64 [E + 2]: routes to each expert, padding excluded; then tokens; then positions, padding included.
            int64 [E]: routes that got no slot; None if nothing is dropped.
        """
        gathered_RX = self._gathered()
        dropped_E = None
        if self.capacity is not None:
            # Whatever the policy, each expert keeps what it has slots for of every rank's tokens.
            dropped_E = (gathered_RX[:, :-2] - self.capacity).clamp(min=0).sum(dim=0)
        return gathered_RX.sum(dim=0), dropped_E

    def _gathered(self) -> Tensor:
        """int64 [R, E + 2]: each rank's tokens per expert, its tokens, its positions."""
        assert self._counts_RX is not None, "needs a forward pass first"
        if self._counting is not None:
            self._counting.wait()
            self._counting = None
        return self._counts_RX

    def _route(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Routing:
        """Route the tokens, and start to gather the counts of all ranks."""
        self.routing = routing = self.gate(hidden_TH, valid_T)
        asked_E = routing.selected_TE().sum(dim=0)
        sizes_2 = asked_E.new_full((2,), hidden_TH.shape[0])
        if valid_T is not None:
            sizes_2[0] = valid_T.sum()
        counts_X = torch.cat([asked_E, sizes_2])
        group = self.count_group
        if group is None or dist.get_world_size(group) == 1:
            self._counts_RX = counts_X[None]
        else:
            flat = counts_X.new_empty(dist.get_world_size(group) * counts_X.numel())
            self._counting = dist.all_gather_into_tensor(flat, counts_X, group=group, async_op=True)
            self._counts_RX = flat.view(-1, counts_X.numel())
        return routing

    @property
    def count_group(self) -> dist.ProcessGroup | None:
        """The ranks whose counts are gathered: of the token group, and until it is told, the expert-parallel ones."""
        return self.token_group or (self.ep_group if self.ep_size > 1 else None)
