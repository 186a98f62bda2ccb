"""What a file holds, in words of the layout-free tensors: every tensor is a flat row of numbers, and every file of
every layout holds ranges of such rows."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
        stacked: whether rows along the first dimension (experts) may lie in different files.
    """

    shape: tuple[int, ...]
    dtype: str
    stacked: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)
