"""Tokens travel: each goes to the ranks that hold its experts, and the results come back.

What travels are the rows of the routes that are kept, sorted by expert, and nothing else: ranks send each other unequal
numbers of rows. How many follows from counts that are gathered first. The gates travel along (`mome_dist.moe.ragged`
says why).
Source: GShard (arXiv 2006.16668) algorithm 2 for capacity; MegaBlocks (arXiv 2211.15841) for experts of unequal loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor

from mome_dist.moe.dispatch.base import Dispatch, Gate
from mome_dist.moe.dispatch.exchange import Flight, all_to_all, gathered
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.ragged import Groups, by_expert
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.routing import Routing
from mome_dist.token_context import TokenContext


class AllToAllDispatch(Dispatch):
    """Dispatch by all-to-all; tokens go there while the frozen module beside the experts computes, and in the backward
    pass their gradients come back while that of the frozen module does.

    Args:
        capacity_factor: tokens of a rank that an expert takes in training, as a multiple of its even share; None drops
            nothing.
        eval_capacity_factor: the same in evaluation.
        min_capacity: the least number of tokens.
        drop_policy: "probs" keeps the most probable tokens of a full expert, "position" the first ones.
    """

    def __init__(
        self,
        moe: MoE,
        gate: Gate,
        experts: RoutedExperts,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
        min_capacity: int,
        drop_policy: str,
    ) -> None:
        super().__init__(moe, gate, experts)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop_policy = min_capacity, drop_policy
        self.kept_TK: Tensor | None = None  # bool, which routes of the latest forward pass an expert took
        # Slots that each expert had for a rank's tokens in the latest forward pass; None if nothing is dropped.
        self.capacity: int | None = None

    @property
    def tokens_travel(self) -> bool:
        return self.ep_size > 1

    def forward(
        self, hidden_TH: Tensor, inside_TD: Tensor, context: TokenContext, shared: ExpertStack | None
    ) -> Tensor:
        return self.begin(hidden_TH, inside_TD, context, shared)()

    def begin(
        self, hidden_TH: Tensor, inside_TD: Tensor, context: TokenContext, shared: ExpertStack | None
    ) -> Callable[[], Tensor]:
        self.routing = routing = self.router(hidden_TH, context)
        counting = self._count(routing)
        laid_out = self.experts.laid_out(hidden_TH.dtype)  # beside the counts that travel
        # The one wait of the host for the device: it must know how many rows travel.
        counts_RX = counting.land().view(-1, self.num_experts + 1).tolist()
        self.capacity = self._capacity(counts_RX)
        self.kept_TK = self._keep(routing, self.capacity)
        sent_SE = self._rows_of_ranks(counts_RX)
        mine = dist.get_rank(self.ep_group) if self.ep_size > 1 else 0
        order_R, tokens = by_expert(
            routing.experts_TK.flatten(), self.kept_TK.flatten(), routing.experts_TK.shape[1], sum(sent_SE[mine])
        )
        gates_R = routing.gates_TK.flatten().index_select(0, order_R)
        local = slice(mine * self.num_local_experts, (mine + 1) * self.num_local_experts)
        received_SL = [row[local] for row in sent_SE]
        groups = Groups.of(received_SL, self.training, hidden_TH.device)
        if self.ep_size == 1:

            def stay() -> Tensor:
                rows = groups.placement.after(tokens)
                results_PD = self.experts.ragged(rows.spread(inside_TD), groups.gates(gates_R), laid_out, groups)
                output_TD = rows.collect(results_PD)
                return output_TD if shared is None else output_TD + shared(inside_TD)

            return stay
        held = self.num_local_experts
        parts = [sum(sent_SE[mine][first : first + held]) for first in range(0, self.num_experts, held)]
        rows_there = [sum(row) for row in received_SL]
        there = [all_to_all(self.ep_group, parts, rows_there) for _ in range(2)]
        there[0].start(gates_R)
        there[1].start(tokens.spread(inside_TD))

        def return_trip() -> Tensor:
            shared_TD = None if shared is None else shared(inside_TD)
            gates_P = groups.gates(there[0].finish())
            rows_PD = groups.placement.spread(there[1].finish())
            results_PD = self.experts.ragged(rows_PD, gates_P, laid_out, groups)
            back = all_to_all(self.ep_group, rows_there, parts)
            back.start(groups.placement.collect(results_PD))
            output_TD = tokens.collect(back.finish())
            return output_TD if shared_TD is None else output_TD + shared_TD

        return return_trip

    def kept(self) -> Tensor | None:
        return None if self.capacity is None else self.kept_TK

    @property
    def count_group(self) -> dist.ProcessGroup | None:
        """The ranks whose counts are gathered: those with other tokens where capacity is agreed on, else those that
        exchange rows."""
        agreeing = self.token_group if self._factor() is not None else None
        return agreeing or (self.ep_group if self.ep_size > 1 else None)

    def _count(self, routing: Routing) -> Flight:
        """int64 [R * (E + 1)]: each rank's tokens per expert, then its number of tokens."""
        asked_E = routing.selected_TE().sum(dim=0)
        if routing.chosen_TK is None:
            tokens = asked_E.sum() // routing.experts_TK.shape[1]
        else:
            valid_T = routing.valid_T
            tokens = asked_E.new_full((), len(routing.experts_TK)) if valid_T is None else valid_T.sum()
        counts_X = torch.cat([asked_E, tokens[None]])
        group = self.count_group
        if group is None or dist.get_world_size(group) == 1:
            return Flight(counts_X, counts_X, None)
        return gathered(counts_X, group)

    def _factor(self) -> float | None:
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def _capacity(self, counts_RX: list[list[int]]) -> int | None:
        """Tokens that an expert takes of every source rank, one number for all; None drops nothing."""
        factor = self._factor()
        if factor is None:
            return None
        tokens = max(counts_X[-1] for counts_X in counts_RX)
        share = tokens * self.router.mean_top_k / self.num_experts
        return max(math.ceil(share * factor), self.min_capacity)

    def _rows_of_ranks(self, counts_RX: list[list[int]]) -> list[list[int]]:
        """Routes that are kept, of every expert-parallel rank (first axis) to every expert (second axis): whatever the
        policy, an expert takes as many of each rank's tokens as ask for it, up to its capacity."""
        group = self.count_group
        if group is not None:
            ranks = dist.get_process_group_ranks(self.ep_group) if self.ep_size > 1 else [dist.get_rank()]
            counts_RX = [counts_RX[dist.get_group_rank(group, rank)] for rank in ranks]
        most = math.inf if self.capacity is None else self.capacity
        return [[int(min(count, most)) for count in counts_X[:-1]] for counts_X in counts_RX]

    def _keep(self, routing: Routing, capacity: int | None) -> Tensor:
        """Bool [T, K]: the routes of tokens, not of padding, that their experts take."""
        if capacity is None:
            kept_TK = routing.chosen_TK
            if kept_TK is None:
                kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
            return kept_TK if routing.valid_T is None else kept_TK & routing.valid_T[:, None]
        selected_TE = routing.selected_TE()
        if self.drop_policy == "position":
            kept_TE = selected_TE & (selected_TE.cumsum(dim=0) <= capacity)
        else:
            strength_TE = torch.where(selected_TE, routing.probs_TE, -1.0)
            strongest_CE = strength_TE.topk(min(capacity, strength_TE.shape[0]), dim=0).indices
            kept_TE = selected_TE & torch.zeros_like(selected_TE).scatter_(0, strongest_CE, True)
        kept_TK = kept_TE.gather(1, routing.experts_TK)
        return kept_TK if routing.chosen_TK is None else kept_TK & routing.chosen_TK
