"""Word error rates against counts made by hand."""

from __future__ import annotations

import math

import pytest

from mome_dist.evaluation.wer import WordErrors, corpus_word_errors, word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "substitutions", "deletions", "insertions"),
    [
        ("put the red ball", "put the red ball", 0, 0, 0),
        ("put the red ball", "put a red ball", 1, 0, 0),
        ("put the red ball", "the ball", 0, 2, 0),
        ("put the red ball", "put the big red ball now", 0, 0, 2),
        ("one two three", "two three four", 0, 1, 1),
        ("one two three", "four five", 2, 1, 0),
        ("one two", "", 0, 2, 0),
        ("", "one two", 0, 0, 2),
        ("", "", 0, 0, 0),
    ],
)
def test_counts_of_single_utterances(
    reference: str, hypothesis: str, substitutions: int, deletions: int, insertions: int
) -> None:
    expected = WordErrors(len(reference.split()), substitutions, deletions, insertions)
    assert word_errors(reference, hypothesis) == expected


def test_corpus_rate_weighs_utterances_by_their_words() -> None:
    # 1 error in 1 word and 1 error in 9 words: 2 / 10, not the mean (100 % + 11 %) / 2.
    errors = corpus_word_errors(["yes", "a b c d e f g h i"], ["no", "a b c d e f g h"])
    assert errors == WordErrors(10, 1, 1, 0)
    assert errors.rate == pytest.approx(20.0)


def test_counts_add_up_over_ranks() -> None:
    parts = [WordErrors(3, 1, 0, 2), WordErrors(5, 0, 1, 0)]
    assert parts[0] + parts[1] == WordErrors(8, 1, 1, 2)
    assert (parts[0] + parts[1]).rate == pytest.approx(50.0)


def test_rate_without_words() -> None:
    assert WordErrors().rate == 0
    assert math.isinf(word_errors("...", "hello").rate)
    assert word_errors("hello", "well hello there again you").rate == pytest.approx(400.0)


def test_case_and_punctuation_are_no_errors_but_apostrophes_are() -> None:
    assert word_errors("It's fine.", "it\u2019s FINE").errors == 0
    assert word_errors("it's fine", "its fine").substitutions == 1
