"""What a speech synthesiser gives: sound, and what the lips show when."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from mome_dist.data.media import Audio
from mome_dist.data.synthetic.speakers import Voice
from mome_dist.data.synthetic.visemes import Segment


class Speech(NamedTuple):
    """``audio``: float32 [samples] at 16 kHz; ``segments``: visemes in order of time."""

    audio: Audio
    segments: list[Segment]


class Synthesiser(Protocol):
    """A speech backend."""

    @property
    def voices(self) -> tuple[str, ...]:
        """Names of the voices."""

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say ``text``; `Voice.warp` is applied by `mome_dist.data.synthetic.speech.synthesise`."""


def split_segment(start: float, end: float, visemes: tuple[str, ...]) -> list[Segment]:
    """Cut a phone into equal parts, one for each of its visemes (a diphthong has two)."""
    step = (end - start) / len(visemes)
    return [Segment(start + i * step, start + (i + 1) * step, viseme) for i, viseme in enumerate(visemes)]
