"""How sure a word error rate is: bootstrap intervals over utterances.

Utterances are drawn with replacement, as many as there are, and the rate of each such resample is errors over words of
the whole: 95 % of the resampled rates lie in the interval. All systems and conditions on the same utterances get the
same resamples, so that their difference can be resampled too: what is hard about an utterance is hard for both and
drops out. Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

`scipy.stats.bootstrap` gives the same intervals (a test compares them) and is not used: it refuses a single utterance,
and gives no interval at all where one resample happens to have no word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mome_dist.evaluation.wer import WordErrors

RESAMPLES = 1000
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 10_000_000  # of utterance numbers: 80 MB


@dataclass(frozen=True)
class Interval:
    """Percentiles of resampled values, in percent of words; ``below`` is the share of resamples below zero."""

    low: float
    high: float
    below: float


class Bootstrap:
    """Resamples of a set of utterances, a pure function of their number and the seed.

    Args:
        utterances: at least 1.
        seed: of the draws.
        resamples: how many.
    """

    def __init__(self, utterances: int, seed: int = 0, resamples: int = RESAMPLES) -> None:
        if utterances < 1 or resamples < 1:
            raise ValueError(f"{utterances} utterances and {resamples} resamples; both must be at least 1")
        self.utterances, self.seed, self.resamples = utterances, seed, resamples

    def rates(self, errors: Sequence[WordErrors]) -> NDArray[np.float64]:
        """Word error rate of every resample, fp64 [B], in percent; NaN where no word was drawn.

        Args:
            errors: of each utterance, in an order that all systems share.
        """
        if len(errors) != self.utterances:
            raise ValueError(f"{len(errors)} utterances, resamples are of {self.utterances}")
        counts_U2 = np.array([[each.errors, each.words] for each in errors], np.int64)
        sums = np.concatenate([counts_U2[drawn_BU].sum(axis=1) for drawn_BU in self._draws()])
        return 100 * np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)

    def interval(self, errors: Sequence[WordErrors]) -> Interval:
        """The interval of one system's rate."""
        return _interval(self.rates(errors))

    def difference(self, first: Sequence[WordErrors], second: Sequence[WordErrors]) -> Interval:
        """The interval of ``second``'s rate minus ``first``'s on the same utterances; it holds no zero where the two
        systems differ at the level of confidence, and ``below`` says how often the second was better."""
        return _interval(self.rates(second) - self.rates(first))

    def _draws(self) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng(self.seed)
        block = max(1, _DRAWS_AT_ONCE // self.utterances)
        for first in range(0, self.resamples, block):
            rows = min(block, self.resamples - first)
            yield rng.integers(self.utterances, size=(rows, self.utterances))


def _interval(values: NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high), float(np.mean(values < 0)))
