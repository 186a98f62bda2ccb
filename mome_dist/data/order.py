"""The order in which utterances are trained on: a pure function of (seed, step).

Utterances come in epochs, each one permutation of the split drawn from (seed, epoch). The stream of epochs is taken in
pools of a few batches; within a pool, utterances of similar length make a batch (less padding), and the batches are
shuffled. So the order is reshuffled every epoch, holds every utterance once an epoch, is the same for every number of
ranks, and continues exactly from any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

POOL = 16  # batches that are sorted by length together


@lru_cache(maxsize=4)
def epoch_permutation(utterances: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch before batches are made: int64 [utterances]."""
    return np.random.default_rng([seed, epoch]).permutation(utterances)


def batch_of_step(lengths: Sequence[int], batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the utterances that make the global batch of a step.

    Args:
        lengths: of every utterance of the split, in any unit; utterances of similar length share a batch.
        batch_size: utterances a step, over all ranks.
    """
    pool, slot = divmod(step, POOL)
    first = pool * POOL * batch_size
    indices = [
        int(epoch_permutation(len(lengths), seed, position // len(lengths))[position % len(lengths)])
        for position in range(first, first + POOL * batch_size)
    ]
    by_length = sorted(indices, key=lambda index: (lengths[index], index))
    batch = int(np.random.default_rng([seed, 1, pool]).permutation(POOL)[slot])
    return by_length[batch * batch_size : (batch + 1) * batch_size]


def share_of_rank(batch: Sequence[int], accumulation: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """One data-parallel rank's part of a global batch.

    The batch is cut into ``accumulation`` chunks, whatever the layout, and every chunk is dealt over the ranks: chunk
    ``i`` holds the same utterances at any number of ranks. Both must divide evenly.
    """
    size = len(batch) // accumulation
    assert size * accumulation == len(batch) and size % dp_size == 0, "batch_size must be divisible; see validate"
    return [list(batch[start + dp_rank : start + size : dp_size]) for start in range(0, len(batch), size)]
