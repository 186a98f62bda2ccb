"""Cutting long clips between words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from mome_dist.data.media import FPS
from mome_dist.data.preparation.text import Word
from mome_dist.errors import UserError

_MARGIN = FPS // 2  # frames kept before the first and after the last word of a segment, at most


class Segment(NamedTuple):
    """Frames ``start`` to ``end`` (exclusive) of a clip, and what is said in them."""

    start: int
    end: int
    text: str


def cut(words: Sequence[Word], frames: int, longest: int) -> list[Segment]:
    """Cut a clip in the middle between two words, into segments of at most ``longest`` frames each.

    Segments take as many words as fit. Silence of more than a second between two segments is in neither.

    Raises:
        UserError: the times of the words do not ascend or lie outside the clip, or one word is longer than a segment.
    """
    if any(later.start < earlier.start for earlier, later in pairwise(words)):
        raise UserError("the times of the words do not ascend")
    if words and words[-1].start * FPS >= frames:
        raise UserError(f"word {words[-1].text!r} starts at {words[-1].start} s of {frames / FPS:.2f} s")
    segments: list[Segment] = []
    first = 0
    while first < len(words):
        start, end, last = *_span(words, first, first, frames), first
        while last + 1 < len(words) and _span(words, first, last + 1, frames)[1] - start <= longest:
            last += 1
            end = _span(words, first, last, frames)[1]
        if end - start > longest:
            raise UserError(f"word {words[first].text!r} takes {(end - start) / FPS:.1f} s")
        text = " ".join(word.text for word in words[first : last + 1] if word.text)
        if text and end > start:
            segments.append(Segment(start, end, text))
        first = last + 1
    return segments


def _span(words: Sequence[Word], first: int, last: int, frames: int) -> tuple[int, int]:
    """Frames from before word ``first`` to after word ``last``."""
    start, end = round(words[first].start * FPS) - _MARGIN, round(words[last].end * FPS) + _MARGIN
    if first > 0:
        start = max(start, _between(words[first - 1], words[first]))
    if last + 1 < len(words):
        end = min(end, _between(words[last], words[last + 1]))
    return max(start, 0), min(end, frames)


def _between(earlier: Word, later: Word) -> int:
    return round((earlier.end + later.start) / 2 * FPS)
