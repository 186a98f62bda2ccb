"""How ZeRO 1 and 2 cut a group of parameters: laid one after the other, padded, divided into equal partitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A partition's number of elements is a multiple of it (4 bytes of fp16, in DeepSpeed's words), whatever the type.
ALIGNMENT = 2


@dataclass(frozen=True)
class Partition:
    """A rank's part of a group.

    Attributes:
        start: of its first element among the group's.
        size: elements, padding included.
        padding: elements at its end that no parameter has.
    """

    start: int
    size: int
    padding: int


@dataclass(frozen=True)
class Fragment:
    """A parameter's part in a partition.

    Attributes:
        number: of the parameter in its group.
        start, stop: elements of the parameter.
        offset: of ``start`` in the partition.
    """

    number: int
    start: int
    stop: int
    offset: int


def partition(elements: int, ranks: int, rank: int) -> Partition:
    """The part of a group of ``elements`` numbers that one of ``ranks`` ranks updates."""
    unit = ALIGNMENT * ranks
    size = -(-elements // unit) * unit // ranks
    start = rank * size
    return Partition(start, size, min(size, max(0, start + size - elements)))


def fragments(counts: Sequence[int], part: Partition) -> Iterator[Fragment]:
    """The parameters, given by their numbers of elements, that have elements in a partition."""
    begin, stop = 0, part.start + part.size
    for number, count in enumerate(counts):
        first, last = max(begin, part.start), min(begin + count, stop)
        if first < last:
            yield Fragment(number, first - begin, last - begin, first - part.start)
        begin += count
