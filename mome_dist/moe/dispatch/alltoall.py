"""Tokens travel: each goes to the ranks that hold its experts, and the results come back.

Source: GShard (arXiv 2006.16668) algorithm 2 for dispatch with capacity; DeepSpeed-MoE (arXiv 2201.05596).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import _AllToAll, _route_slots, _sparse_encode
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mome_dist.moe.dispatch.base import Dispatch, MatryoshkaGate
from mome_dist.moe.dispatch.exchange import all_to_all
from mome_dist.moe.experts import ExpertStack, ExpertWeights, stack_weights
from mome_dist.moe.router import Routing


class AllToAllDispatch(Dispatch):
    """Dispatch by all-to-all; the shared experts are computed while the tokens travel.

    Args:
        capacity_factor: slots an expert has in training, as a multiple of its even share of the tokens; None drops
            nothing.
        eval_capacity_factor: the same in evaluation.
        min_capacity: the least number of slots.
        drop_policy: "probs" keeps the most probable tokens of a full expert, "position" the first ones.
    """

    def __init__(
        self,
        moe: MoE,
        gate: MatryoshkaGate,
        experts: Experts,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
        min_capacity: int,
        drop_policy: str,
    ) -> None:
        super().__init__(moe, gate, experts)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop_policy = min_capacity, drop_policy
        self.kept_TK: Tensor | None = None  # bool, which routes of the latest forward pass got a slot

    def forward(self, hidden_TH: Tensor, valid_T: Tensor | None, shared: ExpertStack | None) -> Tensor:
        routing = self._route(hidden_TH, valid_T)
        capacity = self._capacity(self.counts())
        self.capacity = capacity if self._factor() is not None else None
        slots_TK, self.kept_TK = self._place(routing, capacity)
        experts_KT = torch.where(self.kept_TK, routing.experts_TK, -1).t()
        routes_KT = _route_slots(experts_KT, slots_TK.t(), self.num_experts, capacity)
        buffer = _sparse_encode(hidden_TH, routes_KT, self.num_experts, capacity)
        if self.ep_size > 1:
            exchange = all_to_all(self.ep_group)
            exchange.start(buffer)
        shared_TH = None if shared is None else shared(hidden_TH)
        if self.ep_size > 1:
            buffer = exchange.finish()
        buffer = self.experts(buffer.reshape(self.ep_size, self.num_local_experts, capacity, -1))
        buffer = buffer.reshape(self.num_experts, capacity, -1)
        if self.ep_size > 1:
            buffer = _AllToAll.apply(self.ep_group, buffer)
        output_TH = _Combine.apply(buffer.flatten(0, 1), routes_KT, routing.gates_TK.t())
        return output_TH if shared_TH is None else output_TH + shared_TH

    def _factor(self) -> float | None:
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def _capacity(self, counts_RX: Tensor) -> int:
        """Slots per expert and source rank: one number for all ranks, or the exchange would not fit."""
        factor = self._factor()
        if factor is None:
            return max(int(counts_RX[:, :-1].max()), 1)
        tokens = int(counts_RX[:, -1].max())
        share = tokens * self.gate.k / self.num_experts
        return max(math.ceil(share * factor), self.min_capacity)

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


class BatchedExperts(Experts):
    """DeepSpeed's list of local experts, computed as one batched product: a dozen tiny experts one after the other cost
    more in calls than in arithmetic."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[ranks, local experts, capacity, H] -> the same shape and dtype."""
        ranks, experts, capacity, hidden_size = inputs.shape
        # fp32 parameters, arithmetic in the precision of the frozen LLM.
        weights = ExpertWeights(*(part.to(inputs.dtype) for part in stack_weights(self.deepspeed_experts)))
        tokens_ECH = inputs.transpose(0, 1).reshape(experts, ranks * capacity, hidden_size)
        hidden_ECb = F.gelu(torch.baddbmm(weights.down_bias[:, None], tokens_ECH, weights.down_weight.mT))
        output_ECH = torch.baddbmm(weights.up_bias[:, None], hidden_ECb, weights.up_weight.mT)
        return output_ECH.view(experts, ranks, capacity, hidden_size).transpose(0, 1)


class _Combine(torch.autograd.Function):
    """Gate-weighted sum in fp32 of each token's results; dropped routes add nothing.

    results_RH [R, H] (a row a slot), routes_KT int64 [K, T] (R where dropped), gates_KT fp32 [K, T] -> [T, H]. One of
    the K routes at a time: DeepSpeed's way needs fp32 copies of all of them, and products of bf16 with fp32, for which
    the CPU has no vectorised kernel.
    """

    @staticmethod
    def forward(ctx: Any, results_RH: Tensor, routes_KT: Tensor, gates_KT: Tensor) -> Tensor:
        dropped_KT = routes_KT == results_RH.shape[0]
        # Any row will do where the gate is zero.
        routes_KT, gates_KT = routes_KT.masked_fill(dropped_KT, 0), gates_KT.masked_fill(dropped_KT, 0)
        ctx.save_for_backward(results_RH, routes_KT, gates_KT, dropped_KT)
        output_TH = results_RH.new_zeros(routes_KT.shape[1], results_RH.shape[1], dtype=torch.float32)
        for routes_T, gates_T in zip(routes_KT, gates_KT, strict=True):
            output_TH.addcmul_(results_RH.index_select(0, routes_T).float(), gates_T[:, None])
        return output_TH.to(results_RH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        results_RH, routes_KT, gates_KT, dropped_KT = ctx.saved_tensors
        grad_TH, grad_results_RH, grad_gates_KT = gradients[0].float(), torch.zeros_like(results_RH), []
        for routes_T, gates_T in zip(routes_KT, gates_KT, strict=True):
            grad_gates_KT.append((results_RH.index_select(0, routes_T).float() * grad_TH).sum(dim=1))
            grad_results_RH.index_add_(0, routes_T, (grad_TH * gates_T[:, None]).to(results_RH.dtype))
        return grad_results_RH, None, torch.stack(grad_gates_KT).masked_fill(dropped_KT, 0)
