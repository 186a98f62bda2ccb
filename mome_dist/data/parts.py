"""The parts of a global batch: for every microbatch of a step, and in it for every data-parallel rank.

Whole utterances are dealt, each with all its views: their clips are encoded, pooled and projected once. What is dealt
out evenly is work, not clips: that of all tokens, their attention included.

How many parts a step is cut into is fixed, or follows from a budget of tokens for a rank's microbatch: then one global
batch trains on any number of ranks, in as many microbatches as it takes there. All ranks find the same number, since
all know the lengths of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from mome_dist.data.order import shares_of

Shares = list[list[list[int]]]
"""Indices of utterances by microbatch and data-parallel rank."""


@dataclass(frozen=True)
class Parts:
    """How many microbatches a step has.

    Attributes:
        least: of every step.
        budget: tokens of a rank's microbatch, which more microbatches keep as far as whole utterances can; None for
            ``least`` microbatches in any case.
        multiple: of the number, where the batch has utterances enough; the interleaved pipeline schedule wants one.
    """

    least: int = 1
    budget: int | None = None
    multiple: int = 1

    def shares(self, batch: Sequence[int], tokens: Sequence[int], work: Sequence[int], dp_size: int) -> Shares:
        """Deal out a global batch.

        Args:
            batch: indices of utterances.
            tokens: of each of them, in all views of the step.
            work: of each of them, in any unit.
        """
        most = max(len(batch) // dp_size, 1)
        count = self.least
        if self.budget is not None:
            count = max(count, -(-sum(tokens) // (self.budget * dp_size)))
        while True:
            count = min(-(-count // self.multiple) * self.multiple, most - most % self.multiple or most)
            shares = shares_of(batch, work, count, dp_size)
            if self.budget is None or count + self.multiple > most:
                return shares
            of = dict(zip(batch, tokens, strict=True))
            if max(sum(of[index] for index in hand) for part in shares for hand in part) <= self.budget:
                return shares
            count += self.multiple


def work_of_sequence(tokens: int, attention: float) -> int:
    """Work of a sequence, in that of a hundredth of a token without attention.

    Args:
        attention: what looking at one more token adds to a token's work, see `attention_share`.
    """
    return round(100 * tokens * (1 + attention * tokens))


@dataclass(frozen=True)
class Work:
    """The work of some steps.

    Attributes:
        work: of all ranks together.
        fullest: of the fullest rank of each microbatch, times the number of ranks: they wait for each other there.
        utterances, frames, tokens: of all steps; frames of video, or as many as the sound is long.
        microbatches: of all steps.
        steps: how many.
    """

    work: int = 0
    fullest: int = 0
    utterances: int = 0
    frames: int = 0
    tokens: int = 0
    microbatches: int = 0
    steps: int = 0

    @classmethod
    def of(cls, shares: Shares, frames: dict[int, int], tokens: dict[int, int], work: dict[int, int]) -> Work:
        """The work of one step; what is told of utterances is told by index."""
        hands = [[sum(work[index] for index in hand) for hand in part] for part in shares]
        batch = [index for part in shares for hand in part for index in hand]
        return cls(
            work=sum(map(sum, hands)),
            fullest=sum(len(part) * max(part) for part in hands),
            utterances=len(batch),
            frames=sum(frames[index] for index in batch),
            tokens=sum(tokens[index] for index in batch),
            microbatches=len(shares),
            steps=1,
        )

    @property
    def imbalance(self) -> float:
        """Work of the fullest rank over the mean of the ranks; 1 is even."""
        return self.fullest / self.work

    def mean_tokens(self, dp_size: int) -> int:
        """Tokens of a microbatch of a rank, in the mean."""
        return self.tokens // (self.microbatches * dp_size)

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))

    def describe(self, epoch: int, dp_size: int) -> str:
        """One line on an epoch of so many steps, which are like these."""
        line = (
            f"an epoch is {epoch:,} steps; in the mean {self.utterances / self.steps:.1f} utterances, "
            f"{self.frames / self.steps:,.0f} video frames and {self.tokens / self.steps:,.0f} tokens a step, in "
            f"{self.microbatches / self.steps:.1f} microbatches"
        )
        return f"{line}; the fullest rank has {self.imbalance - 1:.1%} more work than the mean" if dp_size > 1 else line
