"""Tokens of a pass that say the same in a fine view and in a coarse one, for terms in which one teaches the other.

Whoever packs a pass finds them (`mome_dist.speech.cross_rate`); routers and the LLM's last layer only look them up.

Shape suffixes: M coarse speech tokens of a microbatch; W fine tokens that share frames with one of them, at most; Q
pairs of views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mome_dist.transfer import sent_to


class ViewPair(NamedTuple):
    """A view that teaches and one that learns, by their places in the views of a step."""

    fine: int
    coarse: int

    def name(self, views: Sequence[object]) -> str:
        """Such as "avsr(4,2)>avsr(16,2)"."""
        return f"{views[self.fine]}>{views[self.coarse]}"


@dataclass(frozen=True)
class Aligned:
    """The coarse speech tokens of a microbatch that learn, and the fine ones that teach them.

    Attributes:
        pairs: of the step's views; the labels of all views have one order, so that their pairs need no index.
        rows_M: int64, places of the coarse tokens in the pass; each is there once.
        fine_MW: int64, places of the fine tokens.
        shares_MW: fp32, what each counts for in the mean; zero where there is none.
        weights_QM: fp32, by pair one over the pair's coarse tokens in the global batch for its tokens that learn, and
            zero for all others.
    """

    pairs: tuple[ViewPair, ...]
    rows_M: Tensor
    fine_MW: Tensor
    shares_MW: Tensor
    weights_QM: Tensor

    def to(self, device: torch.device) -> Self:
        """A copy on a device; the host does not wait for it."""
        tensors = self.rows_M, self.fine_MW, self.shares_MW, self.weights_QM
        return type(self)(self.pairs, *(sent_to(each, device) for each in tensors))

    def part(self, rank: int, size: int) -> Self:
        """For the ``rank``-th consecutive part of the pass, of ``size`` tokens: places are those in the part; tokens
        elsewhere count for nothing, so that sums over the ranks are those of the whole."""
        rows_M, fine_MW = self.rows_M - rank * size, self.fine_MW - rank * size
        here_M, here_MW = ((each >= 0) & (each < size) for each in (rows_M, fine_MW))
        places = rows_M.clamp(0, size - 1), fine_MW.clamp(0, size - 1)
        return type(self)(self.pairs, *places, self.shares_MW * here_MW, self.weights_QM * here_M)
