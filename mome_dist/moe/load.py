"""What the routers of a stage did in one pass: counted for all layers at once, summed over ranks once.

The load of the experts enters the balance loss as a constant, so that its value is not needed before the backward
pass. Every layer leaves its routes here; they are counted together, one collective sums the counts beside whatever
follows the forward pass, and the backward pass reads them (`mome_dist.moe.balance`).

Shape suffixes: L modules of the stage; V views; X columns: E routes asked for by expert, E of them dropped, then tokens
and positions (tokens and dead ones).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.moe.route_distillation import RouteDistillation


class CountedTokens(Protocol):
    """Tokens that routes are counted of: `mome_dist.token_context.TokenContext`, or the speech tokens alone."""

    @property
    def members_VN(self) -> Tensor:
        """fp32 [V, N], 1 where a token counts for a view, else 0."""

    @property
    def sizes_V2(self) -> Tensor:
        """int64 [V, 2], tokens of each view, and positions."""


BalanceSettings = tuple[int | None, float, tuple[float, ...]]
"""Experts of every token, or None where their number differs; the coefficient of the balance loss; those of the z-loss
and of further losses."""


class StackLoad:
    """What the modules of captured layers leave in place of counting: tensors, which leave the layers beside the hidden
    states (`mome_dist.llm.graphed_stack`).

    Attributes:
        counting: always; as in `PassLoad`.
        distillation: none.
        experts: E, the same for all modules.
        settings: of all modules; None where nothing is balanced.
    """

    counting = True
    distillation: RouteDistillation | None = None

    def __init__(self) -> None:
        self.experts = 0
        self.settings: BalanceSettings | None = None
        self._asked: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}

    def put(
        self,
        place: int,
        tokens: CountedTokens,
        experts: int,
        experts_TK: Tensor,
        kept_TK: Tensor | None = None,
        chosen_TK: Tensor | None = None,
        sums_VS: Tensor | None = None,
    ) -> None:
        """As `PassLoad.put`, where nothing is dropped, every token has K experts and losses are means over tokens."""
        assert kept_TK is None and chosen_TK is None, "captured layers have K experts for every token"
        assert sums_VS is None, "captured layers have no loss of the whole batch"
        self.experts, self._asked[place] = experts, experts_TK

    def leave(self, place: int, sums_VX: Tensor, settings: BalanceSettings) -> None:
        """Leave what a module's balance losses are made of, with gradients."""
        self._sums[place], self.settings = sums_VX, settings

    def tensors(self) -> tuple[Tensor, ...]:
        """int64 [L, T, K], the experts of each token, and fp32 [L, V, ...], the sums; as far as there are any."""
        return tuple(torch.stack([each[place] for place in sorted(each)]) for each in (self._asked, self._sums) if each)


class PassLoad:
    """Counts of one pass.

    Args:
        views: names, in the order of the first axis of what modules `put`.
        group: the ranks that hold other tokens; None if there are none.
        share: what the auxiliary losses of this pass count for in the step's, with what the engine will divide by.
        distillation: between the views of the pass; None without it.
    """

    def __init__(
        self,
        views: tuple[str, ...],
        group: dist.ProcessGroup | None,
        share: float = 1.0,
        distillation: RouteDistillation | None = None,
    ) -> None:
        self.views, self.group, self.share, self.distillation = views, group, share, distillation
        self._put: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._tokens: CountedTokens | None = None
        self._experts = 0
        self._sum_LVX: Tensor | None = None
        self._work: dist.Work | None = None
        self._sums: dict[int, Tensor] = {}
        self._summed: dict[int, Tensor] = {}
        self._sums_work: dist.Work | None = None
        self._computed: dict[Hashable, Tensor] = {}

    @property
    def counting(self) -> bool:
        """Whether modules still count: a pass that is computed again, for its backward pass, was counted before."""
        return self._sum_LVX is None

    def put(
        self,
        place: int,
        tokens: CountedTokens,
        experts: int,
        experts_TK: Tensor,
        kept_TK: Tensor | None = None,
        chosen_TK: Tensor | None = None,
        sums_VS: Tensor | None = None,
    ) -> None:
        """Leave what one module did; nothing is computed yet.

        Args:
            place: of the module in its stage.
            tokens: those of this rank, the same for all modules.
            experts: E, the same for all modules.
            experts_TK: int64 [T, K], the experts that each token asked for.
            kept_TK: bool [T, K], whether they took it; None if nothing can be dropped.
            chosen_TK: bool [T, K], which of them count, for all modules or for none; None if all do.
            sums_VS: fp32 [V, S], to be summed over ranks beside the counts, for all modules or for none.
        """
        self._tokens, self._experts = tokens, experts
        self._put[place] = experts_TK, kept_TK, chosen_TK
        if sums_VS is not None:
            self._sums[place] = sums_VS.detach()

    @torch.no_grad()
    def reduce(self) -> None:
        """Count for all modules at once, and begin to sum over the ranks; all ranks of the group call it once all
        modules have put."""
        if not self._put:
            return
        assert self._tokens is not None
        asked, kept, chosen = zip(*(self._put[place] for place in sorted(self._put)), strict=True)
        self._put = {}
        members_VT, experts_LTK = self._tokens.members_VN, torch.stack(asked)
        ones_LTE = members_VT.new_zeros(*experts_LTK.shape[:2], self._experts)
        # Sums of ones in fp32 are exact up to 2^24 tokens.
        if any(each is None for each in chosen):
            asked_LVE = members_VT @ ones_LTE.scatter(2, experts_LTK, 1.0)
        else:  # an expert may stand in several columns, of which one counts
            chosen_LTK = torch.stack([each for each in chosen if each is not None])
            asked_LVE = members_VT @ ones_LTE.scatter_add(2, experts_LTK, chosen_LTK.float())
        if any(each is None for each in kept):
            dropped_LVE = torch.zeros_like(asked_LVE)
        else:
            kept_LTK = torch.stack([each for each in kept if each is not None])
            dropped_LVE = asked_LVE - members_VT @ ones_LTE.scatter_add(2, experts_LTK, kept_LTK.float())
        sizes_LV2 = self._tokens.sizes_V2.expand(len(asked), -1, -1)
        self._sum_LVX = torch.cat([asked_LVE.long(), dropped_LVE.long(), sizes_LV2], dim=2)
        if self.group is not None and dist.get_world_size(self.group) > 1:
            self._work = dist.all_reduce(self._sum_LVX, group=self.group, async_op=True)
        self._sum_values()
        if self.distillation is not None:
            self.distillation.reduce()

    def _sum_values(self) -> None:
        """Begin to sum what is no count."""
        if not self._sums:
            return
        places = sorted(self._sums)
        sums_LVS = torch.stack([self._sums.pop(place) for place in places])
        if self.group is not None and dist.get_world_size(self.group) > 1:
            self._sums_work = dist.all_reduce(sums_LVS, group=self.group, async_op=True)
        self._summed = dict(zip(places, sums_LVS, strict=True))

    def sums_of(self, place: int) -> Tensor:
        """fp32 [V, S], what one module put beside its routes, over all ranks."""
        if self._sums_work is not None:
            self._sums_work.wait()
            self._sums_work = None
        return self._summed[place]

    def all(self) -> Tensor:
        """int64 [L, V, X], over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self._sum_LVX is not None, "`reduce` comes first"
        return self._sum_LVX

    def once(self, key: Hashable, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What is computed from `all`, for all modules together, when the first of them asks.

        Args:
            key: the same for the same computation.
        """
        if key not in self._computed:
            self._computed[key] = compute(self.all())
        return self._computed[key]

    def of(self, place: int) -> Tensor:
        """int64 [V, X] of one module, over all ranks."""
        return self.all()[place]
