"""What layers know of the tokens that they see.

A pass works on any sequences of any views, one after another and view by view, with no padding between them: hidden
states are [N, 1, H]. Norms, linear maps and experts see N tokens; only attention looks at sequences. N is rounded up
with dead tokens at the end, which belong to no sequence and no view.

Shape suffixes: N tokens, dead ones included; B sequences; V views; P places of a padded batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.draws import draws_of_tokens
from mome_dist.transfer import sent_to

ALIGNMENT = 8
"""N is a multiple of it: kernels of matrix products are chosen by the number of rows."""


def aligned(tokens: int, multiple: int = ALIGNMENT) -> int:
    """A number of tokens, rounded up."""
    return tokens + -tokens % multiple


class Modality(IntEnum):
    """What a token is: text, its tags and dead tokens; speech that was heard; speech that was seen."""

    TEXT = 0
    AUDIO = 1
    VIDEO = 2


class _Once:
    """Mixin of frozen classes: remembers what was computed of them."""

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed of the tokens, without gradients, for all layers when the first of them asks."""
        found: dict[Hashable, Tensor] = self.__dict__.setdefault("_found", {})
        if key not in found:
            found[key] = compute()
        return found[key]


@dataclass(frozen=True)
class OneView(_Once):
    """Tokens of one view that nobody cuts into sequences or counts: those of a pass in one process.

    Attributes:
        view: its name.
        modality_N: int8 [N], see `Modality`; None if all are text.
        tokens: N.
        rows: sequences, all padded to as many tokens.
        draws_N: as in `TokenContext`.
    """

    view: str
    modality_N: Tensor | None
    tokens: int
    rows: int = 1
    alive_N: None = None
    draws_N: Tensor | None = None

    @property
    def view_names(self) -> tuple[str, ...]:
        return (self.view,)

    @property
    def sequence_N(self) -> Tensor:
        """As `TokenContext.sequence_N`."""
        device = None if self.modality_N is None else self.modality_N.device
        return torch.arange(self.rows, device=device).repeat_interleave(self.tokens // self.rows)

    @property
    def members_VN(self) -> Tensor:
        """fp32 [1, N]: all of them."""
        device = None if self.modality_N is None else self.modality_N.device
        return torch.ones(1, self.tokens, device=device)

    def speech_means(self, values_NX: Tensor) -> Tensor | None:
        """As in `mome_dist.moe.routers.base.RoutedTokens`."""
        if self.modality_N is None:
            return None
        speech_BS1 = (self.modality_N != Modality.TEXT).view(self.rows, -1, 1).to(values_NX)
        sums_BX = (values_NX.unflatten(0, (self.rows, -1)) * speech_BS1).sum(dim=1)
        return sums_BX / speech_BS1.sum(dim=1).clamp(min=1)

    def of_utterances(self, values_BX: Tensor, tokens: int) -> Tensor:
        """As in `mome_dist.moe.routers.base.RoutedTokens`; rows of beams lie beside each other."""
        return values_BX.repeat_interleave(tokens // len(values_BX), dim=0)


@dataclass(frozen=True)
class TokenContext(_Once):
    """The tokens of a pass, or a rank's consecutive part of them.

    Attributes:
        lengths: tokens of each sequence, in order; of the whole pass, also in a part of it.
        view_names: of the views, in order.
        view_sequences: sequences of each view.
        members_VN: fp32 [V, N], 1 where a token belongs to a view, else 0.
        sizes_V2: int64 [V, 2], tokens of each view, and positions: dead tokens count with the last view.
        modality_N: int8 [N], see `Modality`.
        alive_N: bool [N]; None if no token is dead.
        positions_N: int64 [N], of each token in its sequence; zero for dead tokens.
        prefixes: tokens of each sequence before its text, like ``lengths``; None where nobody said.
        sequence_N: int64 [N], the number of each token's sequence; dead tokens are one more.
        group: the ranks that have the other parts, if this is one; None where nobody said.
        draws_N: int64 [N], what random numbers of each token are functions of (`mome_dist.draws`); None where nothing
            is drawn.
    """

    lengths: tuple[int, ...]
    view_names: tuple[str, ...]
    view_sequences: tuple[int, ...]
    members_VN: Tensor
    sizes_V2: Tensor
    modality_N: Tensor
    alive_N: Tensor | None
    positions_N: Tensor
    sequence_N: Tensor
    prefixes: tuple[int, ...] | None = None
    group: dist.ProcessGroup | None = None
    draws_N: Tensor | None = None

    @classmethod
    def of(
        cls,
        views: Sequence[tuple[str, Sequence[int]]],
        modality: Sequence[int] | Tensor | None = None,
        multiple: int = ALIGNMENT,
        least: int = 0,
        prefixes: Sequence[int] | None = None,
        draws: Sequence[int] | None = None,
    ) -> Self:
        """The context of whole sequences, on the CPU.

        Args:
            views: name of each view, and the tokens of each of its sequences.
            modality: of every token that is alive; None if all are text.
            multiple: of tokens, which dead ones fill up.
            least: tokens at least.
            prefixes: of each sequence, see the class.
            draws: of each sequence, from 0 below 2^63, of which those of its tokens are made; None where nothing is
                drawn.
        """
        lengths = tuple(itertools.chain.from_iterable(each for _, each in views))
        alive = sum(lengths)
        tokens = aligned(max(alive, least), multiple)
        sizes = torch.tensor([sum(each) for _, each in views])
        members_VN = torch.zeros(len(views), tokens)
        for row, start, size in zip(members_VN, (sizes.cumsum(0) - sizes).tolist(), sizes.tolist(), strict=True):
            row[start : start + size] = 1
        positions = sizes.clone()
        positions[-1] += tokens - alive
        modality_N = torch.zeros(tokens, dtype=torch.int8)
        if modality is not None:
            modality_N[:alive] = torch.as_tensor(modality, dtype=torch.int8)
        positions_N = torch.zeros(tokens, dtype=torch.int64)
        positions_N[:alive] = torch.cat([torch.arange(length) for length in lengths])
        repeats = torch.tensor([*lengths, tokens - alive])
        return cls(
            lengths=lengths,
            view_names=tuple(name for name, _ in views),
            view_sequences=tuple(len(each) for _, each in views),
            members_VN=members_VN,
            sizes_V2=torch.stack([sizes, positions], dim=1),
            modality_N=modality_N,
            alive_N=torch.arange(tokens) < alive if tokens > alive else None,
            positions_N=positions_N,
            sequence_N=torch.arange(len(repeats)).repeat_interleave(repeats),
            prefixes=None if prefixes is None else tuple(prefixes),
            draws_N=None if draws is None else draws_of_tokens(draws, lengths, tokens),
        )

    @property
    def tokens(self) -> int:
        """Dead ones included."""
        return self.modality_N.numel()

    @property
    def alive(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> Self:
        """A copy on a device; the host does not wait for it."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        moved = {n: sent_to(v, device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **(values | moved))

    def part(self, rank: int, ranks: int, group: dist.ProcessGroup | None = None) -> Self:
        """The ``rank``-th of ``ranks`` equal consecutive parts, for what looks at tokens one by one.

        Args:
            group: the ranks, for what looks at whole sequences.
        """
        if ranks == 1:
            return self
        size = self.tokens // ranks
        own = slice(rank * size, (rank + 1) * size)
        members_VN = self.members_VN[:, own].contiguous()
        sizes_V2 = members_VN.sum(dim=1, dtype=torch.float64).long()[:, None].repeat(1, 2)
        alive_N = None if self.alive_N is None else self.alive_N[own]
        if alive_N is not None:
            sizes_V2[-1, 1] += size - alive_N.sum()
        return replace(
            self,
            members_VN=members_VN,
            sizes_V2=sizes_V2,
            modality_N=self.modality_N[own],
            alive_N=alive_N,
            positions_N=self.positions_N[own],
            sequence_N=self.sequence_N[own],
            group=group,
            draws_N=None if self.draws_N is None else self.draws_N[own],
        )

    def speech_means(self, values_NX: Tensor) -> Tensor:
        """As in `mome_dist.moe.routers.base.RoutedTokens`."""
        # One product and not a scattered sum: the same bits every time, forward and backward.
        of_speech_BN = self.once("speech of sequences", lambda: self._members_BN * (self.modality_N != Modality.TEXT))
        sums_BX = torch.cat([of_speech_BN @ values_NX, of_speech_BN.sum(dim=1, keepdim=True)], dim=1)
        if self.group is not None:
            sums_BX = _SumOfRanks.apply(sums_BX, self.group)
        return sums_BX[:, :-1] / sums_BX[:, -1:].detach().clamp(min=1)

    def of_utterances(self, values_BX: Tensor, tokens: int) -> Tensor:
        """As in `mome_dist.moe.routers.base.RoutedTokens`."""
        return self._members_BN.t() @ values_BX

    @property
    def _members_BN(self) -> Tensor:
        """fp32 [B, N], 1 where a token belongs to a sequence, else 0."""
        numbers_B1 = torch.arange(len(self.lengths), device=self.sequence_N.device)[:, None]
        return self.once("sequences", lambda: (self.sequence_N == numbers_B1).float())

    @cached_property
    def starts_B1(self) -> Tensor:
        """int32, where each sequence starts and the last one ends; dead tokens count as one more sequence."""
        lengths = [*self.lengths, *([self.tokens - self.alive] if self.tokens > self.alive else [])]
        starts_B1 = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return sent_to(starts_B1, self.modality_N.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of `starts_B1`."""
        return max(*self.lengths, self.tokens - self.alive)

    @cached_property
    def padding(self) -> Padding:
        """How sequences are padded where a product wants batches."""
        return Padding.of(self.lengths, self.view_sequences, self.modality_N.device)


class _SumOfRanks(torch.autograd.Function):
    """A sum over ranks that all of them use, each for tokens of its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@dataclass(frozen=True)
class FixedTokens(_Once):
    """Tokens of layers that are captured (`mome_dist.llm.graphed_stack`): the host knows how many, and nothing more.

    Attributes:
        members_VN, modality_N, positions_N: as in `TokenContext`.
        alive_N: bool [N].
        starts_B1: as in `TokenContext`; any number of empty sequences follows.
        longest: tokens that no sequence has more of.
        draws_N: nothing is drawn.
    """

    members_VN: Tensor
    modality_N: Tensor
    alive_N: Tensor
    positions_N: Tensor
    starts_B1: Tensor
    longest: int
    draws_N: None = None

    @property
    def view_names(self) -> tuple[str, ...]:
        """Not known."""
        raise NotImplementedError("captured layers know no views by name")

    @property
    def sizes_V2(self) -> Tensor:
        """Not known."""
        raise NotImplementedError("captured layers count nothing")

    @property
    def unseen_NN(self) -> Tensor:
        """bool [N, N], what a token (first axis) does not attend to: later tokens and those of other sequences."""
        return self.once("unseen", self._find_unseen)

    def _find_unseen(self) -> Tensor:
        index_N = torch.arange(self.positions_N.numel(), device=self.positions_N.device)
        sequence_N = self.sequence_N
        return (sequence_N[:, None] != sequence_N) | (index_N[:, None] < index_N)

    @property
    def sequence_N(self) -> Tensor:
        """As `TokenContext.sequence_N`."""
        index_N = torch.arange(self.positions_N.numel(), device=self.starts_B1.device, dtype=torch.int32)
        return torch.searchsorted(self.starts_B1, index_N, right=True)


@dataclass(frozen=True)
class Labels:
    """What is to be predicted.

    Attributes:
        index_L: int64 [L], tokens whose output predicts a label.
        ids_L: int64 [L], the labels.
    """

    index_L: Tensor
    ids_L: Tensor

    def to(self, device: torch.device) -> Labels:
        """A copy on a device; the host does not wait for it."""
        return Labels(sent_to(self.index_L, device), sent_to(self.ids_L, device))


@dataclass(frozen=True)
class Padding:
    """Sequences of a view side by side, padded to its longest; the batches of all views one after the other.

    Attributes:
        shapes: sequences and padded length of each view's batch.
        take_P: int64 [P], the token at each place; where there is none, the first one of the sequence.
        places: int64 [alive tokens], the place of each token.
    """

    shapes: tuple[tuple[int, int], ...]
    take_P: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], batches: Sequence[int], device: torch.device) -> Self:
        """Pad the first ``batches[0]`` sequences together, then the next ones."""
        shapes, take, places, sequence, first, place = [], [], [], 0, 0, 0
        for rows in batches:
            longest = max(lengths[sequence : sequence + rows], default=0)
            shapes.append((rows, longest))
            for length in lengths[sequence : sequence + rows]:
                row = torch.full((longest,), first)
                row[:length] += torch.arange(length)
                take.append(row)
                places.append(torch.arange(place, place + length))
                first, place = first + length, place + longest
            sequence += rows
        take_P, placed = (sent_to(torch.cat(each), device) for each in (take, places))
        return cls(tuple(shapes), take_P, placed)

    def pad(self, rows_N: Tensor) -> Tensor:
        """[N, ...] -> [P, ...]. Padding repeats a token: nothing may come back from there."""
        return _Pad.apply(rows_N, self)

    def strip(self, rows_P: Tensor, tokens: int) -> Tensor:
        """[P, ...] -> [tokens, ...], zero for dead tokens."""
        return _Strip.apply(rows_P, self, tokens)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_N: Tensor, padding: Padding) -> Tensor:
        ctx.padding, ctx.tokens = padding, rows_N.shape[0]
        return rows_N.index_select(0, padding.take_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _stripped(gradients[0], ctx.padding, ctx.tokens), None


class _Strip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_P: Tensor, padding: Padding, tokens: int) -> Tensor:
        ctx.padding = padding
        return _stripped(rows_P, padding, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        padding: Padding = ctx.padding
        rows_P = gradients[0].new_zeros(padding.take_P.numel(), *gradients[0].shape[1:])
        rows_P.index_copy_(0, padding.places, gradients[0][: padding.places.numel()])
        return rows_P, None, None


def _stripped(rows_P: Tensor, padding: Padding, tokens: int) -> Tensor:
    alive = padding.places.numel()
    if alive == tokens:
        return rows_P.index_select(0, padding.places)
    rows_N = rows_P.new_empty(tokens, *rows_P.shape[1:])
    torch.index_select(rows_P, 0, padding.places, out=rows_N[:alive])
    rows_N[alive:] = 0
    return rows_N
