"""What a transcription says: of a clip, and of a film. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from mome_dist.speech.views import View

LONGEST = 16.0  # seconds of a film that are read at once: the longest clip that published systems train on LRS3 with


@dataclass(frozen=True)
class Transcription:
    """What is said in one clip.

    Attributes:
        text: without special tokens, words separated by one space.
        tokens: the text of each token as the tokenizer writes it by itself; part of a character is U+FFFD.
        token_ids: the tokens in the LLM's vocabulary, without the end token.
        log_probs: natural logarithm of each token's probability, given the speech and the tokens before it; None if
            they were not asked for.
        view: task and rates that it was read at.
        tokens_read: tokens that the LLM read before it wrote: speech, tags and prompt. Higher rates mean fewer.
        seconds: length of the clip, of the longer stream where two were read.
        complete: whether the model ended the text; False where the limit of tokens did.
        notes: what was done to the clip beyond decoding, and whether the rates were trained, in words.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    view: View
    tokens_read: int
    seconds: float
    complete: bool
    notes: tuple[str, ...] = ()

    @property
    def audio_rate(self) -> int | None:
        """Audio frames, 50 a second, per token; None if it did not listen."""
        return self.view.audio_rate

    @property
    def video_rate(self) -> int | None:
        """Video frames, 25 a second, per token; None if it did not read lips."""
        return self.view.video_rate

    @property
    def confidence(self) -> float | None:
        """Geometric mean of the tokens' probabilities, in (0, 1]; None without tokens or log-probabilities."""
        return math.exp(sum(self.log_probs) / len(self.log_probs)) if self.log_probs else None

    def __str__(self) -> str:
        return self.text


class Word(NamedTuple):
    """A word and when it is said, in seconds from where its recording starts."""

    text: str
    start: float
    end: float


def spread_words(text: str, start: float, end: float) -> tuple[Word, ...]:
    """Words in equal time for each character: what is known without sound."""
    words = text.split()
    if not words:
        return ()
    letters = [0, *accumulate(len(word) + 1 for word in words)]
    times = [start + (end - start) * before / letters[-1] for before in letters]
    return tuple(Word(word, *edges) for word, edges in zip(words, pairwise(times), strict=True))


@dataclass(frozen=True)
class Segment:
    """What is said in a part of a film.

    Attributes:
        start, end: of the part, seconds from where the film starts.
        said: there.
        words: of it, with their times on the film's clock.
        aligned: whether the times were found in the sound; otherwise words share the part by their letters.
    """

    start: float
    end: float
    said: Transcription
    words: tuple[Word, ...]
    aligned: bool


@dataclass(frozen=True)
class Transcript:
    """What is said in a film.

    Attributes:
        path: of the film.
        seconds: its length.
        segments: in their order; none where nobody speaks.
        notes: what a reader should know of how it was read, in words.
    """

    path: Path
    seconds: float
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """A line for each segment."""
        return "\n".join(segment.said.text for segment in self.segments)
