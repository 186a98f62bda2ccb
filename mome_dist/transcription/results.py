"""What a transcription says. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mome_dist.speech.views import View


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
