"""The order in which utterances are trained on: a pure function of (seed, position).

The position counts utterances since the start of training, over all ranks. Epoch ``e`` is one permutation of the split,
drawn from (seed, e); batches run over epoch ends. So the order is reshuffled every epoch, is the same for every number
of ranks, and continues exactly from any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_permutation(utterances: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: int64 [utterances]."""
    return np.random.default_rng([seed, epoch]).permutation(utterances)


def batch_of_step(utterances: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the utterances that make the global batch of a step."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(epoch_permutation(utterances, seed, at // utterances)[at % utterances]) for at in positions]


def share_of_rank(batch: Sequence[int], accumulation: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """One data-parallel rank's part of a global batch.

    The batch is cut into ``accumulation`` chunks, whatever the layout, and every chunk is dealt over the ranks: chunk
    ``i`` holds the same utterances at any number of ranks. Both must divide evenly.
    """
    size = len(batch) // accumulation
    assert size * accumulation == len(batch) and size % dp_size == 0, "batch_size must be divisible; see validate"
    return [list(batch[start + dp_rank : start + size : dp_size]) for start in range(0, len(batch), size)]
