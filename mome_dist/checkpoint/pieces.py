"""What a file holds, in words of the layout-free tensors: every tensor is a flat row of numbers, and every file of
every layout holds ranges of such rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mome_dist.sharing import Sharing


@dataclass(frozen=True)
class Range:
    """Elements ``start`` to ``stop`` of a tensor, counted in row-major order; ``tensor`` is its layout-free name."""

    tensor: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Constant:
    """fp32 numbers that no layout-free tensor holds, repeated ``times``: padding, counters, modules without tokens."""

    values: tuple[float, ...]
    times: int = 1

    @property
    def count(self) -> int:
        return len(self.values) * self.times


Piece = Range | Constant


@dataclass(frozen=True)
class TensorFacts:
    """A layout-free tensor.

    Attributes:
        shape: whole.
        dtype: torch's name, without ``torch.``.
        sharing: how ranks share it; None for what belongs to one rank, as its random-number generators do.
    """

    shape: tuple[int, ...]
    dtype: str
    sharing: Sharing | None = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether rows along the first dimension (experts) may lie in different files."""
        return self.sharing is not None and self.sharing.experts is not None
