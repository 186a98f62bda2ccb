"""What is said in a whole film: cut at pauses, written down stretch by stretch, put together again.

A model is trained on sentences and its encoders read at most half a minute, so a film that is longer is cut. Memory is
that of the film's sound and of one batch of stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mome_dist.data.media import Audio
from mome_dist.evaluation.checks import check_view
from mome_dist.speech.views import view_of
from mome_dist.transcription.model import Transcriber
from mome_dist.transcription.reading import FilmReading, Part
from mome_dist.transcription.results import LONGEST, Segment, Transcript, Transcription, Word, spread_words

Align = Callable[[Audio, str], Sequence[Word]]
"""Finds the words of a text in a recording of it."""


def transcribe_film(
    model: Transcriber,
    path: str | Path,
    *,
    audio_rate: int | None = None,
    video_rate: int | None = None,
    num_beams: int | None = None,
    log_probs: bool = True,
    longest: float = LONGEST,
    align: Align | None = None,
) -> Transcript:
    """Write down what is said in a film of any length.

    A film of at most ``longest`` seconds is read as one; of a longer one what is said between pauses. Where a part
    shows no face, it is read by ear alone, or, if only lips were asked for, left out; notes say so.

    Args:
        model: that transcribes.
        path: of an audio or video file.
        audio_rate, video_rate, num_beams, log_probs: as in `Transcriber.transcribe`.
        longest: seconds that are read at once.
        align: finds words in sound, as `mome_dist.transcription.words.WordAligner` does; used where sound is read.

    Raises:
        UserError: as `Transcriber.transcribe`; or a film of one part shows no face.
    """
    view = view_of(audio_rate, video_rate)
    check_view(model.run.config, view, "rates")
    reading = FilmReading(model.run.config, path, view, longest)
    return transcribe_reading(model, reading, num_beams=num_beams, log_probs=log_probs, align=align)


def transcribe_reading(
    model: Transcriber,
    reading: FilmReading,
    *,
    num_beams: int | None = None,
    log_probs: bool = True,
    align: Align | None = None,
    heard: Callable[[float], None] = lambda done: None,
) -> Transcript:
    """As `transcribe_film`, of a film that is being read already.

    Args:
        heard: is told how many seconds of the film are done.
    """
    segments: list[Segment] = []
    parts = reading.parts()
    while batch := list(islice(parts, model.run.config.decoding.batch_size)):
        for view in dict.fromkeys(part.view for part in batch):
            same = [part for part in batch if part.view == view]
            said = model.transcribe(
                [part.clip for part in same],
                audio_rate=view.audio_rate,
                video_rate=view.video_rate,
                num_beams=num_beams,
                log_probs=log_probs,
            )
            segments += [_segment(part, each, align) for part, each in zip(same, said, strict=True)]
        heard(batch[-1].stretch.end)
    segments.sort(key=lambda segment: segment.start)
    return Transcript(reading.path, reading.seconds, tuple(segments), tuple(reading.notes))


def _segment(part: Part, said: Transcription, align: Align | None) -> Segment:
    start, end = part.stretch
    if align is None or part.clip.audio is None:
        return Segment(start, end, said, spread_words(said.text, start, end), aligned=False)
    found = align(np.asarray(part.clip.audio), said.text)
    words = tuple(Word(word.text, start + word.start, start + word.end) for word in found)
    return Segment(start, end, said, words, aligned=True)
