"""MoME with its routed experts spread over ranks by DeepSpeed-MoE: tokens travel by all-to-all.

`ExpertParallelMoME` is a `deepspeed.moe.layer.MoE`, because the engine finds expert parameters and their process groups
by that type. It keeps DeepSpeed's experts and all-to-all, and differs in what MoME needs:

- the router (`mome_dist.moe.router`) is fp32, knows padding, and normalises as configured;
- the balance loss is over the global batch, not per shard (`mome_dist.moe.balance`);
- capacity is agreed on by all ranks, since ranks hold different numbers of tokens;
- hidden states are replicated over tensor-parallel ranks and the expert-parallel group lies inside the data-parallel
  one, so each tensor-parallel rank does the same dispatch and no gather over tensor parallelism is needed.

Source: GShard (arXiv 2006.16668) algorithm 2 for dispatch with capacity; DeepSpeed-MoE (arXiv 2201.05596).
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, _AllToAll, _route_slots, _sparse_encode
from torch import Tensor
from torch.nn import functional as F

from mome_dist.moe.balance import load_balance_loss, router_z_loss
from mome_dist.moe.experts import Bottleneck, ExpertStack, initial_value
from mome_dist.moe.router import Routing, route
from mome_dist.moe.statistics import RoutingStatistics


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


class BatchedExperts(Experts):
    """DeepSpeed's list of local experts, computed as one batched product: a dozen tiny experts one after the other cost
    more in calls than in arithmetic."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[ranks, local experts, capacity, H] -> the same shape and dtype."""
        ranks, experts, capacity, hidden_size = inputs.shape
        modules = [cast(Bottleneck, expert) for expert in self.deepspeed_experts]
        # fp32 parameters, arithmetic in the precision of the frozen LLM.
        down_weight_EbH = torch.stack([expert.down.weight for expert in modules]).to(inputs.dtype)
        down_bias_Eb = torch.stack([expert.down.bias for expert in modules]).to(inputs.dtype)
        up_weight_EHb = torch.stack([expert.up.weight for expert in modules]).to(inputs.dtype)
        up_bias_EH = torch.stack([expert.up.bias for expert in modules]).to(inputs.dtype)
        tokens_ECH = inputs.transpose(0, 1).reshape(experts, ranks * capacity, hidden_size)
        hidden_ECb = F.gelu(torch.baddbmm(down_bias_Eb[:, None], tokens_ECH, down_weight_EbH.transpose(1, 2)))
        output_ECH = torch.baddbmm(up_bias_EH[:, None], hidden_ECb, up_weight_EHb.transpose(1, 2))
        return output_ECH.view(experts, ranks, capacity, hidden_size).transpose(0, 1)


class AllToAllDispatch(MOELayer):
    """Send each token to the ranks that hold its experts and bring the results back.

    Args:
        capacity_factor: slots an expert has, as a multiple of its even share of the tokens; None drops nothing.
        min_capacity: the least number of slots.
        drop_policy: "probs" keeps the most probable tokens of a full expert, "position" the first ones.
    """

    def __init__(
        self,
        moe: MoE,
        gate: MatryoshkaGate,
        experts: Experts,
        capacity_factor: float | None,
        min_capacity: int,
        drop_policy: str,
    ) -> None:
        super().__init__(gate, experts, moe.expert_group_name, moe.ep_size, moe.num_local_experts)
        self.num_experts = moe.num_experts
        self.capacity_factor, self.min_capacity, self.drop_policy = capacity_factor, min_capacity, drop_policy
        self.dp_group: dist.ProcessGroup | None = None
        self.routing: Routing | None = None
        self.counts_RE: Tensor | None = None
        self.kept_TK: Tensor | None = None

    def latest(self) -> tuple[Routing, Tensor]:
        """Routing of the latest forward pass, and which routes got a slot, bool [T, K]."""
        assert self.routing is not None and self.kept_TK is not None, "needs a forward pass first"
        return self.routing, self.kept_TK

    def _gather_counts(self, counts_E: Tensor) -> Tensor:
        """[E] -> [R, E]: every data-parallel rank's count of tokens per expert, followed by its number of tokens."""
        if self.dp_group is None or dist.get_world_size(self.dp_group) == 1:
            return counts_E[None]
        gathered = counts_E.new_empty(dist.get_world_size(self.dp_group) * counts_E.numel())
        dist.all_gather_into_tensor(gathered, counts_E, group=self.dp_group)
        return gathered.view(-1, counts_E.numel())

    def _capacity(self, counts_RX: Tensor) -> int:
        """Slots per expert and source rank: one number for all ranks, or the exchange would not fit."""
        if self.capacity_factor is None or not self.training:
            return max(int(counts_RX[:, :-1].max()), 1)
        tokens = int(counts_RX[:, -1].max())
        share = tokens * self.gate.k / self.num_experts
        return max(math.ceil(share * self.capacity_factor), self.min_capacity)

    def _place(self, routing: Routing, capacity: int) -> tuple[Tensor, Tensor]:
        """Slot of each (token, choice) inside its expert's buffer and whether it got one: int64 and bool [T, K]."""
        selected_TE = routing.selected_TE()
        if self.drop_policy == "probs" and capacity < selected_TE.shape[0]:
            strength_TE = torch.where(selected_TE, routing.probs_TE, -1.0)
            strongest_CE = strength_TE.topk(capacity, dim=0).indices
            selected_TE = selected_TE & torch.zeros_like(selected_TE).scatter_(0, strongest_CE, True)
        slots_TE = selected_TE.long().cumsum(dim=0) - 1
        kept_TE = selected_TE & (slots_TE < capacity)
        return slots_TE.gather(1, routing.experts_TK), kept_TE.gather(1, routing.experts_TK)

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None) -> Tensor:
        """[T, H] -> [T, H]; every rank of the data-parallel group must call it the same number of times."""
        self.routing = routing = self.gate(hidden_TH, valid_T)
        tokens = hidden_TH.shape[0] if valid_T is None else valid_T.sum()
        counts_E = routing.selected_TE().sum(dim=0)
        self.counts_RE = counts_RX = self._gather_counts(torch.cat([counts_E, counts_E.new_tensor([int(tokens)])]))
        capacity = self._capacity(counts_RX)
        slots_TK, self.kept_TK = self._place(routing, capacity)
        experts_KT = torch.where(self.kept_TK, routing.experts_TK, -1).t()
        routes_KT = _route_slots(experts_KT, slots_TK.t(), self.num_experts, capacity)
        buffer = _sparse_encode(hidden_TH, routes_KT, self.num_experts, capacity)
        if self.ep_size > 1:
            buffer = _AllToAll.apply(self.ep_group, buffer)
        buffer = self.experts(buffer.reshape(self.ep_size, self.num_local_experts, capacity, -1))
        buffer = buffer.reshape(self.num_experts, capacity, -1)
        if self.ep_size > 1:
            buffer = _AllToAll.apply(self.ep_group, buffer)
        return _combine(buffer.flatten(0, 1), routes_KT, routing.gates_TK.t())


def _combine(results_RH: Tensor, routes_KT: Tensor, gates_KT: Tensor) -> Tensor:
    """Gate-weighted sum in fp32 of each token's results; dropped routes read a row of zeros.

    DeepSpeed's own version multiplies bf16 by fp32, for which the CPU has no vectorised kernel.
    """
    padded_RH = torch.cat([results_RH, results_RH.new_zeros(1, results_RH.shape[1])])
    routed_KTH = padded_RH.index_select(0, routes_KT.flatten()).view(*routes_KT.shape, -1).float()
    return (routed_KTH * gates_KT[..., None]).sum(dim=0).to(results_RH.dtype)


class ExpertParallelMoME(MoE):
    """A MoME module whose routed experts are spread over ``ep_size`` ranks; the shared ones are replicated.

    Args:
        hidden_size, routed_experts, top_k, shared_experts, bottleneck, renormalize: as in `LocalMoME`.
        ep_size: expert-parallel ranks; divides ``routed_experts`` and the data-parallel size.
        capacity_factor, min_capacity, drop_policy: see `AllToAllDispatch`; evaluation never drops.
        balance_loss, z_loss: coefficients of the losses that `auxiliary_loss` returns.
    """

    def __init__(
        self,
        hidden_size: int,
        routed_experts: int,
        top_k: int,
        shared_experts: int,
        bottleneck: int,
        renormalize: bool = True,
        *,
        ep_size: int = 1,
        capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: str = "probs",
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
    ) -> None:
        expert = Bottleneck(hidden_size, bottleneck)
        super().__init__(
            hidden_size,
            expert,
            num_experts=routed_experts,
            ep_size=ep_size,
            k=top_k,
            # Expert groups inside the data-parallel group, one per tensor-parallel rank and pipeline stage.
            enable_expert_tensor_parallelism=True,
        )
        gate = MatryoshkaGate(hidden_size, routed_experts, top_k, renormalize)
        experts = BatchedExperts(expert, self.num_local_experts, self.expert_group_name)
        self.deepspeed_moe = AllToAllDispatch(self, gate, experts, capacity_factor, min_capacity, drop_policy)
        # DeepSpeed's checkpoint code takes any parameter with "expert" in its name for a routed one.
        self.shared = ExpertStack(shared_experts, hidden_size, bottleneck) if shared_experts else None
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.statistics = RoutingStatistics(routed_experts)

    @property
    def ep_rank(self) -> int:
        """This rank's place in its expert-parallel group: it holds experts ``ep_rank * num_local_experts`` and on."""
        return dist.get_rank(self.deepspeed_moe.ep_group) if self.ep_size > 1 else 0

    def set_data_parallel_group(self, group: dist.ProcessGroup | None) -> None:
        """Tell over which ranks the balance loss and the capacity are agreed on."""
        self.deepspeed_moe.dp_group = group

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """As `LocalMoME.initialize`, for the experts that this rank holds. Needs the expert-parallel group."""
        weight = self.deepspeed_moe.gate.wg.weight
        weight.copy_(initial_value(f"{prefix}.router_weight", tuple(weight.shape), seed))
        first = self.ep_rank * self.num_local_experts
        for local, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            for name, parameter in expert.named_parameters():
                key = f"{prefix}.routed.{first + local}.{name.replace('.', '_')}"
                parameter.copy_(initial_value(key, tuple(parameter.shape), seed))
        for name, parameter in self.shared.named_parameters() if self.shared is not None else ():
            for number, value in enumerate(parameter):
                value.copy_(initial_value(f"{prefix}.shared.{number}.{name}", tuple(value.shape), seed))

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H] in the same dtype. ``valid`` is bool [...]; padding gets the shared experts only."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        valid_T = None if valid is None else valid.reshape(-1)
        output_TH = self.deepspeed_moe(hidden_TH, valid_T)
        if self.training:
            self.statistics.add(*self.deepspeed_moe.latest())
        if self.shared is not None:
            activations = self.shared.activations(hidden_TH)
            output_TH = output_TH + self.shared.combine(activations, torch.ones_like(activations[..., 0]))
        return output_TH.view(hidden.shape)

    def auxiliary_loss(self) -> Tensor:
        """This rank's part of the weighted balance and z-loss of the latest forward pass, a scalar with gradient."""
        routing, counts_RX = self.deepspeed_moe.routing, self.deepspeed_moe.counts_RE
        assert routing is not None and counts_RX is not None, "auxiliary_loss needs a forward pass first"
        counts_X = counts_RX.sum(dim=0)
        loss = self.balance_loss * load_balance_loss(routing, counts_X[:-1], counts_X[-1])
        if self.z_loss:
            loss = loss + self.z_loss * router_z_loss(routing, counts_X[-1])
        return loss
