"""Where a long recording is cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mome_dist.data.corpus import Corpus
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.transcription.pauses import (
    CHUNK_SECONDS,
    MARGIN,
    Stretch,
    equal_stretches,
    speech_probabilities,
    stretches_of_speech,
)


def probabilities(seconds: float, *spoken: tuple[float, float]) -> np.ndarray:
    times = (np.arange(round(seconds / CHUNK_SECONDS)) + 0.5) * CHUNK_SECONDS
    return sum((((times >= a) & (times < b)) * 1.0 for a, b in spoken), np.zeros(len(times))).astype(np.float32)


def test_speech_is_kept_with_a_margin_and_pauses_are_not() -> None:
    (first, second) = stretches_of_speech(probabilities(20, (2, 5), (5.3, 6), (9, 12)), 20, longest=16)
    # 0.3 s between two words are no pause, 3 s are one; chunks are 32 ms, pictures 40 ms.
    assert first == pytest.approx((2 - MARGIN, 6 + MARGIN), abs=0.04)
    assert second == pytest.approx((9 - MARGIN, 12 + MARGIN), abs=0.04)
    assert all(time * FPS == pytest.approx(round(time * FPS)) for time in (*first, *second))


def test_stretches_stay_inside_and_apart() -> None:
    first, second = stretches_of_speech(probabilities(4, (0, 1.5), (2.05, 4)), 4, longest=16)
    assert first.start == 0 and second.end == 4
    assert first.end == pytest.approx(1.5 + MARGIN, abs=0.04) and second.start == pytest.approx(2.05 - MARGIN, abs=0.04)
    assert first.end <= second.start


def test_endless_speech_is_cut_where_it_is_quietest() -> None:
    spoken = probabilities(40, (0, 40))
    spoken[round(11 / CHUNK_SECONDS)] = 0.6  # a breath, in the second half of what one stretch may hold
    spoken[round(3 / CHUNK_SECONDS)] = 0.55  # quieter, but too early
    found = stretches_of_speech(spoken, 40, longest=16)
    assert found[0] == pytest.approx((0, 11), abs=0.06)
    assert all(before.end == after.start for before, after in pairwise(found))
    assert (found[0].start, found[-1].end) == (0, 40)
    assert all(stretch.end - stretch.start <= 16 + 1e-9 for stretch in found)


def test_silence_has_no_stretch() -> None:
    assert stretches_of_speech(probabilities(5), 5, longest=16) == []


def test_a_film_without_sound_is_cut_into_equal_parts() -> None:
    assert equal_stretches(40, 16) == [Stretch(0, 13.32), Stretch(13.32, 26.68), Stretch(26.68, 40)]
    assert equal_stretches(16, 16) == [Stretch(0, 16)]


def test_the_detector_tells_speech_from_silence_noise_and_tones(tiny_corpus: Corpus) -> None:
    speech = tiny_corpus.audio(tiny_corpus.split("test")[0])
    rng = np.random.default_rng(0)
    seconds = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    noise = rng.normal(0, 0.05, len(seconds)).astype(np.float32)
    tone = (0.3 * np.sin(2 * np.pi * 300 * seconds)).astype(np.float32)
    assert np.median(speech_probabilities(speech)) > 0.9
    assert max(speech_probabilities(other).max() for other in (np.zeros_like(noise), noise, tone)) < 0.5
    whole = np.concatenate([noise, speech, noise, speech])
    found = stretches_of_speech(speech_probabilities(whole), len(whole) / SAMPLE_RATE, 16)
    length = len(speech) / SAMPLE_RATE
    np.testing.assert_allclose(found, [(2, 2 + length), (4 + length, 4 + 2 * length)], atol=0.4)
