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


def transcribe_film(
    model: Transcriber,
    film: str | Path | FilmReading,
    *,
    audio_rate: int | None = None,
    video_rate: int | None = None,
    num_beams: int | None = None,
    log_probs: bool = True,
    longest: float = LONGEST,
    align: Callable[[Audio, str], Sequence[Word]] | None = None,
    heard: Callable[[float, float], None] = lambda done, seconds: None,
) -> Transcript:
    """Write down what is said in a film of any length.

    A film of at most ``longest`` seconds is read as one; of a longer one what is said between pauses. Where a part
    shows no face, it is read by ear alone, or, if only lips were asked for, left out; notes say so.

    Args:
        model: that transcribes.
        film: the path of an audio or video file, or one that is being read already, which knows its rates and cuts.
        audio_rate, video_rate, num_beams, log_probs: as in `Transcriber.transcribe`.
        longest: seconds that are read at once.
        align: finds words in sound, as `mome_dist.transcription.words.WordAligner` does; used where sound is read.
        heard: is told how many seconds are done, and of how many.

    Raises:
        UserError: as `Transcriber.transcribe`; or a film of one part shows no face.
    """
    config = model.run.config
    if isinstance(film, FilmReading):
        reading = film
    else:
        view = view_of(audio_rate, video_rate)
        check_view(config, view, "rates")
        reading = FilmReading(config, film, view, longest)
    segments: list[Segment] = []
    parts = reading.parts()
    while batch := list(islice(parts, config.decoding.batch_size)):
        for of_view in dict.fromkeys(part.view for part in batch):
            same = [part for part in batch if part.view == of_view]
            said = model.transcribe(
                [part.clip for part in same],
                audio_rate=of_view.audio_rate,
                video_rate=of_view.video_rate,
                num_beams=num_beams,
                log_probs=log_probs,
            )
            segments += [_segment(part, each, align) for part, each in zip(same, said, strict=True)]
        heard(batch[-1].stretch.end, reading.seconds)
    segments.sort(key=lambda segment: segment.start)
    return Transcript(reading.path, reading.seconds, tuple(segments), tuple(reading.notes))


def _segment(part: Part, said: Transcription, align: Callable[[Audio, str], Sequence[Word]] | None) -> Segment:
    start, end = part.stretch
    if align is None or part.clip.audio is None:
        return Segment(start, end, said, spread_words(said.text, start, end), aligned=False)
    found = align(np.asarray(part.clip.audio), said.text)
    words = tuple(Word(word.text, start + word.start, start + word.end) for word in found)
    return Segment(start, end, said, words, aligned=True)
