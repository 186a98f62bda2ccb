"""Random numbers of one utterance: a pure function of (seed, utterance id, draw), the same on every rank and layout."""

from __future__ import annotations

import zlib

import numpy as np


def utterance_rng(seed: int, purpose: str, utterance_id: str, draw: int) -> np.random.Generator:
    """The generator of what is random about an utterance.

    Args:
        seed: of the run or of the evaluation, at least 0.
        purpose: what the numbers are for, such as "babble": each purpose has numbers of its own, so that switching one
            transform off leaves the others as they are.
        draw: counts the times that the utterance is used: the epoch in training, 0 in evaluation.
    """
    words = (purpose, utterance_id)
    return np.random.default_rng([seed, draw, *(zlib.crc32(word.encode()) for word in words)])
