"""Tokens travel: each goes to the ranks that hold its experts, and the results come back.

What travels are the rows of the routes that are kept, sorted by expert, and nothing else: ranks send each other unequal
numbers of rows. How many follows from counts that are gathered first. The gates travel along (`mome_dist.moe.ragged`
says why).
Source: GShard (arXiv 2006.16668) algorithm 2 for capacity; MegaBlocks (arXiv 2211.15841) for experts of unequal loads.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor

from mome_dist.moe.dispatch import drops
from mome_dist.moe.dispatch.base import Dispatch, Gate
from mome_dist.moe.dispatch.exchange import Exchange, Flight, all_to_all, gathered
from mome_dist.moe.dispatch.two_steps import all_to_all_in_two_steps
from mome_dist.moe.experts import ExpertStack
from mome_dist.moe.ragged import Groups, by_expert
from mome_dist.moe.routed import RoutedExperts
from mome_dist.moe.routing import Routing, gates_again
from mome_dist.token_context import TokenContext


class AllToAllDispatch(Dispatch):
    """Dispatch by all-to-all; the shared experts are computed while the tokens travel.

    Args:
        capacity_factor: tokens of a rank that an expert takes in training, as a multiple of its even share; None drops
            nothing.
        eval_capacity_factor: the same in evaluation.
        min_capacity: the least number of tokens.
        drop_policy: "probs" keeps the most probable tokens of a full expert, "position" the first ones; "reroute" does
            as "probs", and sends the others where there is room (`mome_dist.moe.dispatch.drops`).
        reroute_candidates: the most probable experts of a token that it may be sent to; None for all.
        nodes: that the expert-parallel ranks are on, as many on each and one after another: tokens travel within nodes,
            then between them. One for any.
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
        reroute_candidates: int | None = None,
        nodes: int = 1,
    ) -> None:
        super().__init__(moe, gate, experts)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop_policy = min_capacity, drop_policy
        self.reroute_candidates, self.nodes = reroute_candidates, nodes
        # Bool, which routes of the latest forward pass the expert took that the router chose.
        self.kept_TK: Tensor | None = None
        # Slots that each expert had for a rank's tokens in the latest forward pass; None if nothing is dropped.
        self.capacity: int | None = None

    def forward(self, hidden_TH: Tensor, context: TokenContext, shared: ExpertStack | None) -> Tensor:
        self.routing = routing = self.router(hidden_TH, context)
        counting = self._count(routing)
        laid_out = self.experts.laid_out(hidden_TH.dtype)  # beside the counts that travel
        # The one wait of the host for the device: it must know how many rows travel.
        counts_RX = counting.land().view(-1, self.num_experts + 1).tolist()
        self.capacity = self._capacity(counts_RX)
        self.kept_TK = self._keep(routing, self.capacity)
        experts_TK, gates_TK, taken_TK = routing.experts_TK, routing.gates_TK, self.kept_TK
        if self.capacity is not None and self.drop_policy == "reroute":
            experts_TK, gates_TK, taken_TK, counting = self._reroute(routing, self.capacity)
            counts_RX = counting.land().view(-1, self.num_experts + 1).tolist()
        sent_SE = self._rows_of_ranks(counts_RX)
        mine = dist.get_rank(self.ep_group) if self.ep_size > 1 else 0
        routes = sum(sent_SE[mine])
        order_R, tokens = by_expert(experts_TK.flatten(), taken_TK.flatten(), experts_TK.shape[1], routes)
        gates_R = gates_TK.flatten().index_select(0, order_R)
        local = slice(mine * self.num_local_experts, (mine + 1) * self.num_local_experts)
        received_SL = [row[local] for row in sent_SE]
        groups = Groups.of(received_SL, self.training, hidden_TH.device)
        if self.ep_size == 1:
            rows = groups.placement.after(tokens)
            results_PH = self.experts.ragged(rows.spread(hidden_TH), groups.gates(gates_R), laid_out, groups)
            output_TH = rows.collect(results_PH)
            return output_TH if shared is None else output_TH + shared(hidden_TH)
        held = self.num_local_experts
        firsts = range(0, self.num_experts, held)
        rows_SD = [[sum(row[first : first + held]) for first in firsts] for row in sent_SE]
        there = [self._exchange(rows_SD, mine) for _ in range(2)]
        there[0].start(gates_R)
        there[1].start(tokens.spread(hidden_TH))
        shared_TH = None if shared is None else shared(hidden_TH)
        gates_P = groups.gates(there[0].finish())
        rows_PH = groups.placement.spread(there[1].finish())
        results_PH = self.experts.ragged(rows_PH, gates_P, laid_out, groups)
        back = self._exchange([list(column) for column in zip(*rows_SD, strict=True)], mine)
        back.start(groups.placement.collect(results_PH))
        output_TH = tokens.collect(back.finish())
        return output_TH if shared_TH is None else output_TH + shared_TH

    def _exchange(self, rows_SD: list[list[int]], mine: int) -> Exchange:
        """An exchange of so many rows from each rank (first axis) to each (second axis)."""
        if self.nodes > 1:
            return all_to_all_in_two_steps(self.ep_group, rows_SD, mine, self.nodes)
        return all_to_all(self.ep_group, rows_SD[mine], [row[mine] for row in rows_SD])

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
        return drops.slots(tokens, self.router.mean_top_k, self.num_experts, factor, self.min_capacity)

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
        if capacity is not None:
            return drops.kept(routing, capacity, self.drop_policy)
        kept_TK = routing.chosen_TK
        if kept_TK is None:
            kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
        return kept_TK if routing.valid_T is None else kept_TK & routing.valid_T[:, None]

    def _reroute(self, routing: Routing, capacity: int) -> tuple[Tensor, Tensor, Tensor, Flight]:
        """Experts, gates and which of them count, [T, K] each, after routes without a slot went to others; and how many
        rows of each rank then travel, as `_count` has them."""
        assert self.kept_TK is not None
        experts_TK, taken_TK = drops.rerouted(routing, self.kept_TK, capacity, self.reroute_candidates)
        form = self.router.spec
        gates_TK = gates_again(routing, experts_TK, form.renormalize, form.score)
        moved = replace(routing, experts_TK=experts_TK, chosen_TK=taken_TK)
        return experts_TK, gates_TK, taken_TK, self._count(moved)
