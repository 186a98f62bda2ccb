"""Corpus-level word error rate: ``100 (S + D + I) / N`` with N the number of reference words.

Errors are added up over the corpus before dividing, so long utterances weigh more than short ones; the mean of
per-utterance rates is another quantity. Alignment is Levenshtein's, by jiwer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer

from mome_dist.text import normalize


@dataclass(frozen=True)
class WordErrors:
    """Counts of words; add them over utterances, batches or ranks.

    Attributes:
        words: reference words.
        substitutions, deletions, insertions: of a minimal alignment.
    """

    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        """Sum of both counts."""
        return WordErrors(
            self.words + other.words,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def errors(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Word error rate in percent. It exceeds 100 with many insertions; without any reference word it is 0 for no
        error and infinite otherwise."""
        if self.words == 0:
            return 0.0 if self.errors == 0 else math.inf
        return 100 * self.errors / self.words


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Errors of one hypothesis, both texts normalised. Either may be empty."""
    reference, hypothesis = normalize(reference), normalize(hypothesis)
    words = len(reference.split())
    if words == 0 or not hypothesis:  # nothing to align
        return WordErrors(words, 0, words, len(hypothesis.split()))
    output = jiwer.process_words(reference, hypothesis)
    return WordErrors(words, output.substitutions, output.deletions, output.insertions)


def corpus_word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Errors over a corpus, utterance by utterance."""
    return total(word_errors(*pair) for pair in zip(references, hypotheses, strict=True))


def total(parts: Iterable[WordErrors]) -> WordErrors:
    """Sum of counts."""
    return sum(parts, WordErrors())
