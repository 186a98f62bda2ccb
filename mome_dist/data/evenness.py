"""How even the work of data-parallel ranks is, how full batches are, and how much of them is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mome_dist.data.order import Order, shares_of


@dataclass(frozen=True)
class Work:
    """The work of some steps, in video frames.

    Attributes:
        frames: of all utterances.
        fullest: of the fullest rank of each chunk, times the number of ranks: ranks wait for each other in every chunk.
        padded: with every rank's part of a chunk padded to its longest clip.
        utterances: of all steps.
    """

    frames: int
    fullest: int
    padded: int
    utterances: int

    @property
    def imbalance(self) -> float:
        """Work of the fullest rank over the mean of the ranks; 1 is even."""
        return self.fullest / self.frames

    @property
    def padding(self) -> float:
        """Part of what is computed that is padding."""
        return 1 - self.frames / self.padded

    def __add__(self, other: Work) -> Work:
        return Work(
            self.frames + other.frames,
            self.fullest + other.fullest,
            self.padded + other.padded,
            self.utterances + other.utterances,
        )


def work_of(batch: Sequence[int], lengths: Sequence[int], accumulation: int, dp_size: int) -> Work:
    """The work of one step.

    Args:
        batch: indices of the utterances of its global batch.
        lengths: of all utterances of the split.
    """
    chunks = shares_of(batch, [lengths[index] for index in batch], accumulation, dp_size)
    parts = [[[lengths[index] for index in part] for part in chunk] for chunk in chunks]
    return Work(
        frames=sum(lengths[index] for index in batch),
        fullest=dp_size * sum(max(sum(part) for part in chunk) for chunk in parts),
        padded=sum(max(part) * len(part) for chunk in parts for part in chunk),
        utterances=len(batch),
    )


def describe_epoch(order: Order, steps: int, accumulation: int, dp_size: int) -> str:
    """One line on an epoch, from its first steps: ``steps`` of them at most."""
    count = order.steps_of(1)
    looked_at = min(steps, count)
    work = Work(0, 0, 0, 0)
    for step in range(looked_at):
        work += work_of(order.batch(step), order.lengths, accumulation, dp_size)
    line = (
        f"an epoch is {count:,} steps; in the mean {work.utterances / looked_at:.1f} utterances and "
        f"{work.frames / looked_at:,.0f} video frames a step, {work.padding:.1%} padding"
    )
    return f"{line}, the fullest rank {work.imbalance - 1:.1%} above the mean" if dp_size > 1 else line
