"""The order in which utterances are trained on: a pure function of (seed, step).

Utterances come in epochs, each one permutation of the split drawn from (seed, epoch). A global batch holds either a
fixed number of utterances (`BatchOrder`) or as many as a budget of video frames has room for (`FrameOrder`, the way of
the speech literature: clips differ tenfold in length, so that a fixed number of them is a step of very uneven work).
Both take pools of a few batches, sort each by length (clips of a batch are then alike), and shuffle the batches. So the
order is reshuffled every epoch, holds every utterance once an epoch, is the same for every number of ranks, and
continues exactly from any step.

The ranks and microbatches of a step get parts of its batch (`shares_of`, `mome_dist.data.parts`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mome_dist.data.corpus import Utterance
from mome_dist.errors import UserError

_NAMED = 5  # utterances that an error message names


@lru_cache(maxsize=4)
def epoch_permutation(utterances: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch before batches are made: int64 [utterances]."""
    return np.random.default_rng([seed, epoch]).permutation(utterances)


class Order(Protocol):
    """Which utterances every step trains on."""

    @property
    def lengths(self) -> Sequence[int]:
        """The length of every utterance of the split, in video frames."""

    def batch(self, step: int) -> list[int]:
        """Indices of the utterances that make the global batch of a step."""

    def steps_of(self, epochs: int) -> int:
        """Steps after which every utterance was seen ``epochs`` times."""

    def utterances_before(self, step: int) -> int:
        """Utterances of all steps before one."""

    def smallest_batch(self, steps: int) -> tuple[int, int]:
        """The step with the fewest utterances among the first ``steps``, and their number. Where batches come in
        epochs, all of the last one count."""


@dataclass(frozen=True)
class BatchOrder:
    """Batches of a fixed number of utterances. The last batch of an epoch is filled from the next one.

    So a pool that reaches into the next epoch, as every one does that is larger than the split, has some utterances
    twice; sorted by length they are neighbours, and a batch may hold both, which then count double in that step. Over
    the epochs all count alike. It stays so because a checkpoint holds nothing of the order but the step: another order
    would have every run that resumes lose some utterances and repeat others. A training of a split that is smaller than
    a pool is told so beforehand (`mome_dist.preflight`). `FrameOrder` has no batch across epochs.

    Attributes:
        lengths: of every utterance of the split, in any unit.
        batch_size: utterances a step, over all ranks.
        pool: batches that are sorted by length together. More of them mean clips of like lengths; one means that a
            batch holds all lengths, which a short training learns more from.
        seed: of the run.
    """

    lengths: Sequence[int]
    batch_size: int
    pool: int
    seed: int

    def batch(self, step: int) -> list[int]:
        """Indices of the utterances that make the global batch of a step."""
        pool, slot = divmod(step, self.pool)
        first, count = pool * self.pool * self.batch_size, len(self.lengths)
        indices = [
            int(epoch_permutation(count, self.seed, position // count)[position % count])
            for position in range(first, first + self.pool * self.batch_size)
        ]
        if self.pool > 1:
            indices.sort(key=lambda index: (self.lengths[index], index))
        place = int(np.random.default_rng([self.seed, 1, pool]).permutation(self.pool)[slot])
        return indices[place * self.batch_size : (place + 1) * self.batch_size]

    def steps_of(self, epochs: int) -> int:
        """Steps after which as many utterances were seen as ``epochs`` epochs have."""
        return -(-epochs * len(self.lengths) // self.batch_size)

    def utterances_before(self, step: int) -> int:
        """Utterances of all steps before one."""
        return step * self.batch_size

    def smallest_batch(self, steps: int) -> tuple[int, int]:
        """All are equal."""
        return 0, self.batch_size


class FrameOrder:
    """Batches whose video frames do not exceed a budget. Every epoch is cut into batches of its own.

    A pool is sorted by length and cut into the fewest batches that keep the budget, all of nearly equal frames; the
    batches of the whole epoch are then shuffled. With a pool of one batch nothing is sorted and a batch holds all
    lengths. Epochs differ by a few steps.

    Args:
        lengths: of every utterance of the split, in video frames, none longer than the budget.
        max_frames: video frames a step, over all ranks.
        pool: batches that are sorted by length together.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], max_frames: int, pool: int, seed: int) -> None:
        assert min(lengths) > 0 and max(lengths) <= max_frames, "see `order_of`"
        self.lengths, self.max_frames, self.pool, self.seed = lengths, max_frames, pool, seed
        self._array = np.asarray(lengths, dtype=np.int64)
        self._epochs: dict[int, list[NDArray[np.int64]]] = {}  # the batches of the epochs used last
        self._starts = [0]  # first step of every epoch that was looked at, and of the one after it
        self._smallest: list[tuple[int, int]] = []  # of every epoch: step and utterances of its smallest batch

    def batch(self, step: int) -> list[int]:
        """Indices of the utterances that make the global batch of a step."""
        epoch = self._epoch_of(step)
        batch: list[int] = self._batches(epoch)[step - self._starts[epoch]].tolist()
        return batch

    def steps_of(self, epochs: int) -> int:
        """Steps of the first ``epochs`` epochs."""
        self._visit(epochs)
        return self._starts[epochs]

    def utterances_before(self, step: int) -> int:
        """Utterances of all steps before one."""
        epoch = self._epoch_of(step)
        before = self._batches(epoch)[: step - self._starts[epoch]]
        return epoch * len(self.lengths) + sum(map(len, before))

    def smallest_batch(self, steps: int) -> tuple[int, int]:
        """The smallest batch of the epochs that the first ``steps`` steps touch: its step, and its utterances."""
        return min(self._smallest[: self._epoch_of(steps - 1) + 1], key=lambda found: found[1])

    def _epoch_of(self, step: int) -> int:
        while self._starts[-1] <= step:
            self._visit(len(self._starts))
        return bisect_right(self._starts, step) - 1

    def _visit(self, epochs: int) -> None:
        """Know where the first ``epochs`` epochs start and end."""
        for epoch in range(len(self._starts) - 1, epochs):
            sizes = [len(batch) for batch in self._batches(epoch)]
            smallest = min(range(len(sizes)), key=sizes.__getitem__)
            self._smallest.append((self._starts[-1] + smallest, sizes[smallest]))
            self._starts.append(self._starts[-1] + len(sizes))

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        if epoch not in self._epochs:
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._composed(epoch)
        return self._epochs[epoch]

    def _composed(self, epoch: int) -> list[NDArray[np.int64]]:
        order = epoch_permutation(len(self.lengths), self.seed, epoch)
        frames = np.cumsum(self._array[order])
        pools = 1
        if self.pool > 1 and frames[-1] > self.max_frames:
            # Two at least: one pool of the whole split, sorted, would make the same batches every epoch.
            pools = max(2, -(-int(frames[-1]) // (self.pool * self.max_frames)))
        ends = np.searchsorted(frames, [int(frames[-1]) * (number + 1) // pools for number in range(pools)]) + 1
        batches: list[NDArray[np.int64]] = []
        for first, last in pairwise([0, *ends.tolist()]):
            indices = order[first:last]
            if self.pool > 1:  # longest first: what cannot be cut evenly is left to the short ones
                indices = indices[np.lexsort((indices, -self._array[indices]))]
            batches += [indices[start:end] for start, end in cut_evenly(self._array[indices], self.max_frames)]
        shuffled = np.random.default_rng([self.seed, 1, epoch]).permutation(len(batches))
        return [batches[place] for place in shuffled]


def cut_evenly(lengths: Sequence[int] | NDArray[np.int64], budget: int) -> list[tuple[int, int]]:
    """Cut a row of clips into runs of nearly equal totals, none above the budget, and as few as that allows.

    Each run in turn takes its share of what is left, to the nearest clip; where the last one then exceeds the budget,
    one more run is cut.

    Args:
        lengths: of the clips in their order, each from 1 to ``budget``.

    Returns:
        First clip of each run, and the one after its last.
    """
    ends: list[int] = np.cumsum(lengths).tolist()
    runs = _fewest_runs(ends, budget)
    while True:  # as many runs as clips keep the budget
        cuts = _cut(ends, budget, runs)
        first = cuts[-1][0]
        if ends[-1] - (ends[first - 1] if first else 0) <= budget:
            return cuts
        runs += 1


def _cut(ends: Sequence[int], budget: int, runs: int) -> list[tuple[int, int]]:
    """Cut into a number of runs of which the last may exceed the budget."""
    cuts, first, done = [], 0, 0
    for left in range(runs, 1, -1):
        goal = done + (ends[-1] - done) // left
        last = bisect_left(ends, goal, first) + 1  # the first end at or above the goal
        if last > first + 1 and goal - ends[last - 2] < ends[last - 1] - goal:
            last -= 1
        # Within the budget, and a clip at least for every run that follows.
        last = min(last, bisect_right(ends, done + budget, first), len(ends) - (left - 1))
        cuts.append((first, last))
        first, done = last, ends[last - 1]
    return [*cuts, (first, len(ends))]


def _fewest_runs(ends: Sequence[int], budget: int) -> int:
    """Runs when each is filled up to the budget: no way to cut needs fewer."""
    runs, done, first = 0, 0, 0
    while first < len(ends):
        first = bisect_right(ends, done + budget, first)
        runs, done = runs + 1, ends[first - 1]
    return runs


def order_of(
    utterances: Sequence[Utterance], batch_size: int | None, max_frames: int | None, pool: int, seed: int
) -> Order:
    """The order of a split: by ``batch_size`` or by ``max_frames``, whichever is given.

    Raises:
        UserError: naming the utterances that are longer than the budget.
    """
    lengths = [utterance.length for utterance in utterances]
    if max_frames is None:
        assert batch_size is not None, "see `mome_dist.config.values`"
        return BatchOrder(lengths, batch_size, pool, seed)
    too_long = [utterance for utterance in utterances if utterance.length > max_frames]
    if too_long:
        too_long.sort(key=lambda utterance: -utterance.length)
        named = ", ".join(f"{utterance.id} ({utterance.length})" for utterance in too_long[:_NAMED])
        more = f" and {len(too_long) - _NAMED} more" if len(too_long) > _NAMED else ""
        raise UserError(
            f"data.max_frames={max_frames} has no room for {named}{more}, in video frames: raise it to at least "
            f"{too_long[0].length}, or prepare the corpus without them."
        )
    return FrameOrder(lengths, max_frames, pool, seed)


def check_shares(order: Order, steps: int, accumulation: int, dp_size: int) -> None:
    """See that every rank has an utterance in every chunk of the first ``steps`` steps.

    Raises:
        UserError: naming the step that has too few.
    """
    step, utterances = order.smallest_batch(steps)
    if utterances < accumulation * dp_size:
        raise UserError(
            f"step {step + 1} would have {utterances} utterances, but {accumulation * dp_size} = {accumulation} "
            f"(data.accumulation) x {dp_size} data-parallel ranks are needed, so that every rank has one in every "
            "microbatch: raise data.max_frames, lower data.accumulation, or use fewer data-parallel ranks."
        )


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Deal clips into hands whose totals are nearly equal and whose counts differ by at most one.

    In rounds, longest clips first: in each round the hand with the least so far gets the longest. Totals then differ by
    no more than the largest difference within a round (a missing clip of the last round counts as length zero).

    Returns:
        Positions in ``lengths`` of each hand's clips, longest first.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    for start in range(0, len(lengths), hands):
        poorest_first = sorted(range(hands), key=lambda hand: (totals[hand], hand))
        for position, hand in zip(longest_first[start : start + hands], poorest_first, strict=False):
            dealt[hand].append(position)
            totals[hand] += lengths[position]
    return dealt


def shares_of(batch: Sequence[int], lengths: Sequence[int], accumulation: int, dp_size: int) -> list[list[list[int]]]:
    """The parts of a global batch, by chunk and data-parallel rank.

    The batch is dealt into ``accumulation`` chunks, whatever the layout, and every chunk is dealt over the ranks: a
    chunk holds the same utterances at any number of ranks, and every rank has one of them at least.

    Args:
        batch: indices of utterances, at least ``accumulation * dp_size`` of them.
        lengths: of these utterances, in any unit.
    """
    assert len(batch) >= accumulation * dp_size, "see `check_shares`"
    shares = []
    for chunk in deal(lengths, accumulation):
        hands = deal([lengths[position] for position in chunk], dp_size)
        shares.append([[batch[chunk[position]] for position in hand] for hand in hands])
    return shares


def share_of_rank(
    batch: Sequence[int], lengths: Sequence[int], accumulation: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """One data-parallel rank's part of a global batch, by chunk; see `shares_of`."""
    return [chunk[dp_rank] for chunk in shares_of(batch, lengths, accumulation, dp_size)]
