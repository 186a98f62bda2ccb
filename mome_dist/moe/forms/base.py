"""What an expert is: its tensors, how they start, what they cost, and what is computed of them.

Everything else asks here: how experts are kept and spread over ranks (`mome_dist.moe.experts`, `mome_dist.moe.routed`),
how tokens meet them (`mome_dist.moe.dispatch`), what they cost (`mome_dist.planning`) and what a checkpoint calls them.
A form says what one expert computes. All experts for every token, and every expert for its own rows, follow from that
by autograd; a form that has something faster overrides them. `WideForm` is for experts whose units know nothing of each
other: several of them side by side are one wide expert, and so one product each way. A form may also have tensors that
all experts of a layer share, before and after what each of them computes.

This file and those of the forms import no torch until something is computed: a launcher refuses a mistake, and a plan
is made, without it.

Shape suffixes: H hidden size, b units of an expert, T tokens, N rows, P rows in expert order, E routed experts, X all
experts (routed ones first), W units of several experts side by side, D values of a row that experts read and give.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mome_dist.moe.columns import Shapes
    from mome_dist.moe.plain_pack import Pack
    from mome_dist.moe.ragged import Groups

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A tensor of an expert.

    Attributes:
        name: ``STEM_weight`` or ``STEM_bias``.
        dims: its dimensions, "b" and "H", such as "bH" for [b, H].
        start: "uniform" in +-1/sqrt(last dimension), or "zero".
    """

    name: str
    dims: str
    start: str = "uniform"

    def shape(self, hidden_size: int, bottleneck: int) -> Shape:
        """Its sizes."""
        sizes = {"H": hidden_size, "b": bottleneck}
        return tuple(sizes[dim] for dim in self.dims)

    @property
    def saved_name(self) -> str:
        """Its name in DeepSpeed's state dicts, ``STEM.weight``."""
        return saved_name(self.name)


def saved_name(name: str) -> str:
    """``STEM_weight`` -> ``STEM.weight``, as DeepSpeed's state dicts have it."""
    stem, _, kind = name.rpartition("_")
    return f"{stem}.{kind}"


def part_order(name: str) -> tuple[str, bool, str]:
    """Sorts the tensors of an expert as they lie in memory and in files: by stem, a weight before its bias. So tools
    that see names and shapes alone know the order."""
    stem, _, kind = name.rpartition("_")
    return stem, kind != "weight", kind


class ExpertForm(ABC):
    """A form of an expert. Its methods are given the tensors in the order of `parts`, of one expert or stacked.

    Attributes:
        parts: the tensors, in the order of `part_order`. Exactly those that end what an expert computes start at zero,
            so that it adds nothing at first, and yet has a gradient.
        common: tensors of a layer, not of an expert: those that `enter` and `leave` are given. With one of them that
            starts at zero and ends all experts, none of ``parts`` does.
        narrows: whether units whose weights are all zero give zero and get no gradient, so that an expert may have less
            units than its tensors have room for (`mome_dist.moe.widths`).
        dispatches: that the form works with.
        kernel: whether `mome_dist.moe.triton` computes it.
    """

    parts: tuple[Part, ...]
    common: tuple[Part, ...] = ()
    narrows: bool = False
    dispatches: tuple[str, ...] = ("local", "gather", "alltoall")
    kernel: bool = False

    @abstractmethod
    def one(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """What one expert computes: [N, H] -> [N, H]; a row's result depends on that row alone. Here and below, of a
        form with `common` tensors rows have D values in the place of H (`width`)."""

    def width(self, hidden_size: int, bottleneck: int) -> int:
        """D, values of a row that experts read and give, and that travel: H by default."""
        return hidden_size

    def enter(self, hidden_TH: Tensor, *common: Tensor) -> Tensor:
        """What experts read, made once for all of them: [T, H] -> [T, D]. Routers read the hidden states.

        Args:
            common: the layer's own tensors, in any dtype; products are in that of ``hidden_TH``.
        """
        return hidden_TH

    def leave(self, output_TD: Tensor, *common: Tensor) -> Tensor:
        """The output of the module from the sum of its experts: [T, D] -> [T, H], linear and zero at zero."""
        return output_TD

    def weighted(self, rows_NH: Tensor, gates_N: Tensor, *parts: Tensor) -> Tensor:
        """`one` times a gate for each row [N], in the dtype of the rows."""
        return self.one(rows_NH, *parts) * gates_N[:, None]

    def dense(
        self, hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor, shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """All experts for every token: the gate-weighted sum of the routed ones, and the sum of the shared ones.

        Here an expert at a time, each of whose outputs autograd keeps.

        Args:
            hidden_TH: [T, H]; its dtype is that of the products and of the result.
            routed: stacked parts [E, ...] in any dtype.
            gates_TE: fp32 [T, E], zero where an expert is not used.
            shared: stacked parts of the experts that every token uses with a gate of one.

        Returns:
            [T, H].
        """
        output_TH = hidden_TH.new_zeros(hidden_TH.shape) if shared is None else self.summed(hidden_TH, shared)
        gates = gates_TE.to(hidden_TH.dtype).unbind(dim=1)
        for gates_T, own in zip(gates, _each(_cast(routed, hidden_TH)), strict=True):
            output_TH = output_TH + self.weighted(hidden_TH, gates_T, *own)
        return output_TH

    def summed(self, hidden_TH: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The sum of some experts' outputs for every token: [T, H] -> [T, H], in the same dtype.

        Args:
            weights: stacked parts, in any dtype.
        """
        output_TH = hidden_TH.new_zeros(hidden_TH.shape)
        for own in _each(_cast(weights, hidden_TH)):
            output_TH = output_TH + self.one(hidden_TH, *own)
        return output_TH

    def lay_out(self, packed_EP: Tensor, shapes: Shapes, dtype: torch.dtype) -> Any:
        """Weights of E experts as `ragged` wants them, which need not wait for the rows; here stacked parts.

        Args:
            packed_EP: experts one after another, in any dtype (`mome_dist.moe.columns`).
            shapes: of their parts.
            dtype: of the rows.
        """
        from mome_dist.moe.columns import unpack

        return unpack(packed_EP, shapes, dtype)

    def ragged(
        self, rows_PH: Tensor, gates_P: Tensor, packed_EP: Tensor, shapes: Shapes, laid_out: Any, groups: Groups
    ) -> Tensor:
        """Each row through the expert of its group, times its gate.

        Args:
            rows_PH: [P, H] as ``groups`` places them.
            gates_P: fp32 [P], zero for padding.
            packed_EP, shapes: as of `lay_out`; what gets the gradient, unless ``laid_out`` passes it on.
            laid_out: from `lay_out`.

        Returns:
            [P, H] in the dtype of ``rows_PH``.
        """
        import torch

        results: list[Tensor] = []
        rows_of, gates_of = rows_PH.split(groups.sizes), gates_P.to(rows_PH.dtype).split(groups.sizes)
        for rows, gates, own in zip(rows_of, gates_of, _each(laid_out), strict=True):
            # The first expert goes without rows, too: weights of a rank without any have a gradient of zero then.
            if len(rows) or not results:
                step = groups.block or max(len(rows), 1)
                blocks = zip(rows.split(step), gates.split(step), strict=True)
                results += [self.weighted(*block, *own) for block in blocks]
        return torch.cat(results)

    def packed(
        self,
        maps_RH: Tensor | None,
        stacks: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        common: Sequence[Tensor] = (),
    ) -> Pack:
        """All experts of a layer and their router, laid out once for passes without a gradient.

        Args:
            maps_RH: of the router, fp32 (`mome_dist.moe.routers.base.Router.maps`); None if it has none.
            stacks: stacked parts of the routed experts, and of shared ones if there are any.
            dtype: of the hidden states.
            common: the layer's own tensors.
        """
        from mome_dist.moe.plain_pack import PlainPack

        return PlainPack(self, maps_RH, stacks, dtype, common)

    def shapes(self, hidden_size: int, bottleneck: int) -> tuple[Shape, ...]:
        """The shapes of the parts."""
        return tuple(part.shape(hidden_size, bottleneck) for part in self.parts)

    def parameters(self, hidden_size: int, bottleneck: int) -> int:
        """Numbers in one expert."""
        return sum(map(math.prod, self.shapes(hidden_size, bottleneck)))

    def common_parameters(self, hidden_size: int, bottleneck: int) -> int:
        """Numbers of a layer beside its experts; every token passes through all of them once."""
        return sum(math.prod(part.shape(hidden_size, bottleneck)) for part in self.common)

    def common_kept(self, hidden_size: int, bottleneck: int) -> int:
        """Values that autograd keeps for a token between `enter` and `leave`, beside what experts keep: by default what
        enters and what leaves."""
        return 2 * self.width(hidden_size, bottleneck) if self.common else 0

    def macs(self, hidden_size: int, bottleneck: int) -> int:
        """Multiply-adds of one expert for a row, in products: by default every matrix once."""
        return sum(math.prod(shape) for shape in self.shapes(hidden_size, bottleneck) if len(shape) > 1)

    def kept(self, hidden_size: int, bottleneck: int) -> int:
        """Values that autograd keeps for a row in one expert, beside the row and the gate: by default its output, which
        the gate multiplies, and two maps of b units before and after what is not linear."""
        return hidden_size + 4 * bottleneck

    def kept_of_rows(self, hidden_size: int, bottleneck: int) -> int:
        """The same in `ragged`."""
        return self.kept(hidden_size, bottleneck)

    def joined(self, hidden_size: int, bottleneck: int) -> int:
        """Weights of one expert that autograd keeps in the precision of the products."""
        return self.parameters(hidden_size, bottleneck)

    def joined_of_rows(self, hidden_size: int, bottleneck: int) -> int:
        """The same in `ragged`."""
        return self.joined(hidden_size, bottleneck)


class WideForm(ExpertForm):
    """Experts ``E(h) = U units(h) + c``, where every unit is a function of the row and of weights of its own.

    Attributes:
        parts: those whose dimensions begin with "b" belong to the units; one is U, "Hb", and one may be c, "H".
    """

    @abstractmethod
    def units(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """Values of units: [N, H] -> [N, W], for any number W of units.

        Args:
            parts: of the units, [W, ...].
        """

    def one(self, rows_NH: Tensor, *parts: Tensor) -> Tensor:
        """As `ExpertForm.one`."""
        from torch.nn import functional as F

        inputs, up_Hb, bias_H = self._split(parts)
        return F.linear(self.units(rows_NH, *inputs), up_Hb, bias_H)

    def weighted(self, rows_NH: Tensor, gates_N: Tensor, *parts: Tensor) -> Tensor:
        """As `ExpertForm.weighted`; what the gates multiply are the b units."""
        inputs, up_Hb, bias_H = self._split(parts)
        gates_N1 = gates_N[:, None]
        output_NH = (self.units(rows_NH, *inputs) * gates_N1) @ up_Hb.t()
        return output_NH if bias_H is None else output_NH + gates_N1 * bias_H

    def dense(
        self, hidden_TH: Tensor, routed: Sequence[Tensor], gates_TE: Tensor, shared: Sequence[Tensor] | None = None
    ) -> Tensor:
        """As `ExpertForm.dense`: all units at once, the gates as a mask, and one product with all of U."""
        import torch

        stacks = [_cast(stack, hidden_TH) for stack in ([routed] if shared is None else [routed, shared])]
        joined = [torch.cat(parts) for parts in zip(*stacks, strict=True)] if shared is not None else stacks[0]
        gates_TX = gates_TE.to(hidden_TH.dtype)
        if shared is not None:
            gates_TX = torch.cat([gates_TX, gates_TX.new_ones(len(gates_TX), len(shared[0]))], dim=1)
        inputs, up_XHb, bias_XH = self._split(joined)
        units_TW = self.units(hidden_TH, *(part.flatten(0, 1) for part in inputs))
        gated_TXb = units_TW.unflatten(1, (len(up_XHb), -1)) * gates_TX[:, :, None]
        output_TH = gated_TXb.flatten(1) @ up_XHb.mT.flatten(0, 1)
        return output_TH if bias_XH is None else output_TH + gates_TX @ bias_XH

    def summed(self, hidden_TH: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """As `ExpertForm.summed`: together they are one wide expert."""
        from torch.nn import functional as F

        inputs, up_XHb, bias_XH = self._split(weights)
        dtype = hidden_TH.dtype
        units_TW = self.units(hidden_TH, *(part.flatten(0, 1).to(dtype) for part in inputs))
        bias_H = None if bias_XH is None else bias_XH.sum(dim=0).to(dtype)
        return F.linear(units_TW, up_XHb.transpose(0, 1).flatten(1).to(dtype), bias_H)

    def kept(self, hidden_size: int, bottleneck: int) -> int:
        """As `ExpertForm.kept`: products, what is made of each of them, and that times the gates."""
        products = sum(part.dims == "bH" for part in self.parts)
        return (2 * products + 1) * bottleneck

    def _split(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The parts of the units, U and c."""
        by_dims = list(zip((part.dims for part in self.parts), parts, strict=True))
        (up,) = [part for dims, part in by_dims if dims == "Hb"]
        bias = [part for dims, part in by_dims if dims == "H"]
        return [part for dims, part in by_dims if dims[0] == "b"], up, bias[0] if bias else None


def _each(stacks: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The parts of one expert after the other; their gradients are put together once."""
    return zip(*(stack.unbind() for stack in stacks), strict=True)


def _cast(parts: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    return [part.to(like.dtype) for part in parts]
