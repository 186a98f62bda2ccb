"""The order in which utterances are trained on: a pure function of (seed, step).

Utterances come in epochs, each one permutation of the split drawn from (seed, epoch). The stream of epochs is taken in
pools of a few batches; within a pool, utterances of similar length make a batch (less padding), and the batches are
shuffled. So the order is reshuffled every epoch, holds every utterance once an epoch, is the same for every number of
ranks, and continues exactly from any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4)
def epoch_permutation(utterances: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch before batches are made: int64 [utterances]."""
    return np.random.default_rng([seed, epoch]).permutation(utterances)


@dataclass(frozen=True)
class BatchOrder:
    """Which utterances every step trains on.

    Attributes:
        lengths: of every utterance of the split, in any unit.
        batch_size: utterances a step, over all ranks.
        pool: batches that are sorted by length together. More of them mean less padding; one means that a batch holds
            all lengths, which a short training learns more from.
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


def share_of_rank(batch: Sequence[int], accumulation: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """One data-parallel rank's part of a global batch.

    The batch is cut into ``accumulation`` chunks, whatever the layout, and every chunk is dealt over the ranks: chunk
    ``i`` holds the same utterances at any number of ranks. Both must divide evenly.
    """
    size = len(batch) // accumulation
    assert size * accumulation == len(batch) and size % dp_size == 0, "batch_size must be divisible; see validate"
    return [list(batch[start + dp_rank : start + size : dp_size]) for start in range(0, len(batch), size)]
