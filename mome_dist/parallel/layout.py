"""One object that says how a world of processes is divided, and refuses divisions that cannot work.

Ranks are numbered as Megatron-Core does: tensor-parallel rank fastest, then data-parallel, then pipeline stage. Expert
parallelism divides the data-parallel ranks: consecutive groups of ``ep`` data-parallel ranks share one set of experts.
This module needs neither torch nor any process group, so that a launcher can check a layout before it starts anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from mome_dist.errors import UserError
from mome_dist.llm.shape import LLMShape


@dataclass(frozen=True)
class Coordinates:
    """The place of one rank: indices along each axis of the layout."""

    tp: int
    dp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes: tensor (tp), pipeline (pp), expert (ep) and data (dp) parallel; ``tp * pp * dp`` processes."""

    tp: int
    pp: int
    ep: int
    dp: int

    @classmethod
    def for_world(cls, world_size: int, tp: int, pp: int, ep: int) -> Layout:
        """Divide ``world_size`` processes; what tp and pp leave over is data parallel.

        Raises:
            UserError: if the sizes do not fit; the message names the key and possible values.
        """
        for name, value in (("tp", tp), ("pp", pp), ("ep", ep)):
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
                f"pp {pp}): choose ep from {_divisors(dp)}, or start a multiple of {tp * pp * ep} processes."
            )
        return cls(tp=tp, pp=pp, ep=ep, dp=dp)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        dp = rank // self.tp % self.dp
        return Coordinates(tp=rank % self.tp, dp=dp, pp=rank // (self.tp * self.dp), ep=dp % self.ep)

    def check_model(self, shape: LLMShape, routed_experts: int, pad_heads: bool) -> None:
        """Check that the layout can divide a model.

        Args:
            shape: of the LLM.
            routed_experts: of each MoME module.
            pad_heads: whether attention heads may be padded to a multiple of tp.

        Raises:
            UserError: naming the parallel key, the model's number, and sizes that would work.
        """
        for what, value in (("vocabulary entries", shape.vocabulary), ("feed-forward units", shape.ffn_size)):
            if value % self.tp:
                raise UserError(
                    f"parallel.tp={self.tp} does not divide the LLM's {value} {what}: {self._tp_choices(shape)}"
                )
        if shape.kv_heads % self.tp and not pad_heads:
            padded = shape.with_padded_heads(self.tp)
            raise UserError(
                f"parallel.tp={self.tp} does not divide the LLM's {shape.heads} attention heads in {shape.kv_heads} "
                f"key-value groups: {self._tp_choices(shape)}, or set llm.pad_heads=true to compute with "
                f"{padded.heads} heads, the added ones zero."
            )
        layers = shape.layers
        if self.pp > layers:
            raise UserError(
                f"parallel.pp={self.pp} is more than the LLM's {layers} layers: choose pp from {_divisors(layers)}."
            )
        if layers % self.pp:
            raise UserError(
                f"parallel.pp={self.pp} does not divide the LLM's {layers} layers: choose pp from {_divisors(layers)}."
            )
        if routed_experts % self.ep:
            raise UserError(
                f"parallel.ep={self.ep} does not divide mome.routed_experts={routed_experts}: choose ep from "
                f"{[d for d in _divisors(routed_experts) if self.dp % d == 0]}, or another number of experts."
            )

    @staticmethod
    def _tp_choices(shape: LLMShape) -> str:
        sizes = (shape.kv_heads, shape.vocabulary, shape.ffn_size)
        return f"choose tp from {[d for d in _divisors(shape.kv_heads) if all(size % d == 0 for size in sizes)]}"

    def describe(self) -> str:
        """The layout in one line, for logs."""
        return f"{self.world_size} processes = tp {self.tp} x pp {self.pp} x dp {self.dp} (ep {self.ep})"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
