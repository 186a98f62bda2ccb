"""Bootstrap intervals: against a closed form, against scipy's, and do they hold what they promise?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mome_dist.evaluation import bootstrap
from mome_dist.evaluation.bootstrap import Bootstrap
from mome_dist.evaluation.comparison import difference
from mome_dist.evaluation.wer import WordErrors


def drawn(rng: np.random.Generator, utterances: int, rate: float = 0.2) -> list[WordErrors]:
    """Utterances of 3 to 12 words, each word wrong with a probability that varies between utterances."""
    words = rng.integers(3, 13, utterances)
    hard = rng.beta(2, 2 * (1 - rate) / rate, utterances)  # mean `rate`
    return [WordErrors(int(n), int(rng.binomial(n, p))) for n, p in zip(words, hard, strict=True)]


def test_utterances_of_equal_length_in_closed_form() -> None:
    """Equal lengths make the rate a mean, whose interval is mean +- 1.96 sd / sqrt(U) for many utterances."""
    rng = np.random.default_rng(0)
    utterances, words = 2000, 10
    errors = [WordErrors(words, int(count)) for count in rng.binomial(words, 0.3, utterances)]
    counts = np.array([each.errors for each in errors])
    mean, spread = 100 * counts.mean() / words, 100 * counts.std() / words / np.sqrt(utterances)
    interval = Bootstrap(utterances, seed=1, resamples=4000).interval(errors)
    # A percentile of B resamples has a standard error of sqrt(0.025 * 0.975 / B) / density(1.96) = 0.042 spreads at
    # B = 4000; four of them.
    assert interval.low == pytest.approx(mean - 1.96 * spread, abs=0.17 * spread)
    assert interval.high == pytest.approx(mean + 1.96 * spread, abs=0.17 * spread)


def test_the_interval_is_the_one_of_scipy() -> None:
    errors = drawn(np.random.default_rng(2), 150)
    counts = np.array([[each.errors, each.words] for each in errors])

    def rate(wrong: np.ndarray, words: np.ndarray, axis: int) -> np.ndarray:
        return 100 * wrong.sum(axis=axis) / words.sum(axis=axis)

    found = stats.bootstrap(
        (counts[:, 0], counts[:, 1]), rate, paired=True, n_resamples=8000, method="percentile", rng=3, vectorized=True
    )
    interval = Bootstrap(len(errors), seed=4, resamples=8000).interval(errors)
    # Both are random: two percentiles of 8000 resamples, 0.03 standard errors each; four times their difference.
    slack = 4 * 0.03 * np.sqrt(2) * found.standard_error
    assert interval.low == pytest.approx(found.confidence_interval.low, abs=slack)
    assert interval.high == pytest.approx(found.confidence_interval.high, abs=slack)


def test_a_single_utterance_has_an_interval_which_scipy_refuses() -> None:
    with pytest.raises(ValueError, match="two or more"):
        stats.bootstrap((np.array([1]), np.array([4])), lambda wrong, words: wrong / words, paired=True)
    interval = Bootstrap(1).interval([WordErrors(4, 1)])
    assert (interval.low, interval.high) == (25, 25)


def test_it_is_the_loop_over_utterances_that_it_stands_for() -> None:
    errors = drawn(np.random.default_rng(5), 17)
    drawn_BU = np.random.default_rng(9).integers(17, size=(50, 17))
    expected = [
        100 * sum(errors[i].errors for i in row) / sum(errors[i].words for i in row) for row in drawn_BU.tolist()
    ]
    assert Bootstrap(17, seed=9, resamples=50).rates(errors) == pytest.approx(expected)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = drawn(np.random.default_rng(6), 30)
    whole = Bootstrap(30, seed=1).rates(errors)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 100)
    assert np.array_equal(Bootstrap(30, seed=1).rates(errors), whole)
    assert not np.array_equal(Bootstrap(30, seed=2).rates(errors), whole)


def test_the_true_rate_is_inside_as_often_as_promised() -> None:
    """400 test sets of 100 utterances: 95 % means 380; percentile intervals are a little short at this size."""
    rng = np.random.default_rng(7)
    true = 20.0  # words and difficulty are independent, so the rate over words is the mean difficulty
    inside = 0
    for seed in range(400):
        interval = Bootstrap(100, seed=seed, resamples=300).interval(drawn(rng, 100))
        inside += interval.low <= true <= interval.high
    assert 0.91 <= inside / 400 <= 0.98


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    rng = np.random.default_rng(8)
    first = drawn(rng, 200)
    second = [WordErrors(each.words, max(0, each.errors - int(rng.random() < 0.2))) for each in first]
    sampler = Bootstrap(200, seed=0)
    one, two = sampler.interval(first), sampler.interval(second)
    assert one.low < two.high, "apart, the two cannot be told from each other"
    found = difference(first, second)
    assert found["high"] < 0, "paired, the second is better"
    assert found["better"] == 1
    assert found["difference"] == pytest.approx(found["wer"] - found["other_wer"])
    assert found["low"] <= found["difference"] <= found["high"]
    same = difference(first, first)
    assert (same["low"], same["high"], same["better"]) == (0, 0, 0)


def test_utterances_without_words_and_wrong_sizes() -> None:
    errors = [WordErrors(0, 0, 0, 1), WordErrors(4, 1)]
    interval = Bootstrap(2, seed=0).interval(errors)
    assert 0 <= interval.low <= interval.high <= 75  # resamples without any word do not count
    with pytest.raises(ValueError, match="2 utterances, resamples are of 3"):
        Bootstrap(3).rates(errors)
    with pytest.raises(ValueError, match="at least 1"):
        Bootstrap(0)
