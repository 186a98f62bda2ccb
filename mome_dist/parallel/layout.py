"""One object that says how a world of processes is divided, and refuses divisions that cannot work.

Ranks are numbered as Megatron-Core does: tensor-parallel rank fastest, then data-parallel, then pipeline stage. Expert
parallelism divides the data-parallel ranks: consecutive groups of ``ep`` data-parallel ranks share one set of experts.
This module needs neither torch nor any process group, so that a launcher can check a layout before it starts anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mome_dist.errors import UserError


@dataclass(frozen=True)
class Coordinates:
    """The place of one rank: indices along each axis of the layout."""

    tp: int
    dp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """How a world of ``tp * pp * dp`` processes divides a model and its work.

    Attributes:
        tp, pp, ep, dp: sizes of the tensor, pipeline, expert and data parallel axes; ep lies inside dp.
        virtual: model chunks of a pipeline rank; more than one means the interleaved schedule.
        sequence_parallel: whether hidden states between products are split over the tensor-parallel ranks.
        recompute: activations that the backward pass computes again: "none", "selective" (attention) or "full".
        stage_layers: layers of each of the ``pp * virtual`` stages, in layer order; None divides evenly.
    """

    tp: int
    pp: int
    ep: int
    dp: int
    virtual: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    stage_layers: tuple[int, ...] | None = None

    @classmethod
    def for_world(
        cls,
        world_size: int,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        virtual: int = 1,
        sequence_parallel: bool = False,
        recompute: str = "none",
        stage_layers: Sequence[int] | None = None,
    ) -> Layout:
        """Divide ``world_size`` processes; what tp and pp leave over is data parallel.

        Raises:
            UserError: if the sizes do not fit; the message names the key and possible values.
        """
        for name, value in (("tp", tp), ("pp", pp), ("ep", ep), ("virtual", virtual)):
            if value < 1:
                raise UserError(f"parallel.{name}={value}: must be at least 1.")
        if world_size % (tp * pp):
            raise UserError(
                f"parallel.tp={tp} x parallel.pp={pp} = {tp * pp} does not divide the {world_size} started processes: "
                f"start a multiple of {tp * pp} processes, or change tp and pp."
            )
        dp = world_size // (tp * pp)
        if dp % ep:
            raise UserError(
                f"parallel.ep={ep} does not divide the data-parallel size {dp} (= {world_size} processes / tp {tp} / "
                f"pp {pp}): choose ep from {divisors(dp)}, or start a multiple of {tp * pp * ep} processes."
            )
        if virtual > 1 and pp == 1:
            raise UserError(f"parallel.virtual={virtual} interleaves pipeline stages, but parallel.pp=1 has only one.")
        if sequence_parallel and tp == 1:
            raise UserError(
                "parallel.sequence_parallel=true splits sequences over tensor-parallel ranks, but parallel.tp=1."
            )
        stages = None if stage_layers is None else tuple(stage_layers)
        if stages is not None and len(stages) != pp * virtual:
            raise UserError(
                f"parallel.stage_layers={list(stages)} names {len(stages)} stages, but there are {pp * virtual} = "
                f"parallel.pp={pp} x parallel.virtual={virtual}."
            )
        return cls(tp, pp, ep, dp, virtual, sequence_parallel, recompute, stages)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        dp = rank // self.tp % self.dp
        return Coordinates(tp=rank % self.tp, dp=dp, pp=rank // (self.tp * self.dp), ep=dp % self.ep)

    def check_division(self, layers: int, routed_experts: int) -> None:
        """Check that the layout can divide layers and experts: all that a checkpoint without the LLM can tell.

        Raises:
            UserError: naming the parallel key, the model's number, and sizes that would work.
        """
        self._check_stages(layers)
        if not routed_experts and self.ep > 1:
            raise UserError(
                f"parallel.ep={self.ep} spreads routed experts over ranks, but the run has none: set parallel.ep=1."
            )
        if routed_experts % self.ep:
            raise UserError(
                f"parallel.ep={self.ep} does not divide mome.routed_experts={routed_experts}: choose ep from "
                f"{[d for d in divisors(routed_experts) if self.dp % d == 0]}, or another number of experts."
            )

    def stages(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage, in layer order; stage ``chunk * pp + pp_rank`` is that chunk of that pipeline rank."""
        return self.stage_layers or (layers // (self.pp * self.virtual),) * (self.pp * self.virtual)

    def layers_of(self, pp_rank: int, layers: int) -> list[int]:
        """The numbers of a pipeline rank's layers, from zero; the stages of its chunks one after the other."""
        ends = list(itertools.accumulate(self.stages(layers)))
        begins = [0, *ends[:-1]]
        return [n for stage in range(pp_rank, len(ends), self.pp) for n in range(begins[stage], ends[stage])]

    def _check_stages(self, layers: int) -> None:
        stages = self.pp * self.virtual
        if self.stage_layers is not None:
            if sum(self.stage_layers) != layers or min(self.stage_layers) < 0:
                raise UserError(
                    f"parallel.stage_layers={list(self.stage_layers)} adds up to {sum(self.stage_layers)}, but the LLM "
                    f"has {layers} layers."
                )
        elif layers % stages:
            reason = "is more than" if stages > layers else "does not divide"
            name = f"parallel.pp={self.pp}" + (f" x parallel.virtual={self.virtual}" if self.virtual > 1 else "")
            raise UserError(
                f"{name} {reason} the LLM's {layers} layers: choose from {divisors(layers)}, or say with "
                "parallel.stage_layers how many layers each stage gets."
            )

    def rank_map(self) -> str:
        """A table of the coordinates of every rank."""
        rows = ["rank  tp  pp  dp  ep"]
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            rows.append(f"{rank:4d}  {at.tp:2d}  {at.pp:2d}  {at.dp:2d}  {at.ep:2d}")
        return "\n".join(rows)

    def describe(self) -> str:
        """The layout in one line, for logs."""
        extras = [
            f"{self.virtual} chunks a stage" if self.virtual > 1 else "",
            "sequence parallel" if self.sequence_parallel else "",
            f"{self.recompute} recomputation" if self.recompute != "none" else "",
            f"stages of {', '.join(map(str, self.stage_layers))} layers" if self.stage_layers else "",
        ]
        sizes = f"{self.world_size} processes = tp {self.tp} x pp {self.pp} x dp {self.dp} (ep {self.ep})"
        return ", ".join([sizes, *(extra for extra in extras if extra)])


def divisors(number: int) -> list[int]:
    """All divisors of a number, the smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]
