"""What is said in a whole film: cut at pauses, written down stretch by stretch, put together again.

A model is trained on sentences and its encoders read at most half a minute, so a film that is longer is cut. Memory is
that of the film's sound and of one batch of stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mome_dist.data.films import Film, film_with
from mome_dist.data.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, Audio, Video
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError
from mome_dist.errors import UserError
from mome_dist.evaluation.checks import check_view
from mome_dist.speech.geometry import AVHUBERT, expected_geometry
from mome_dist.speech.views import View, streams_read, view_of
from mome_dist.transcription.inputs import Clip, no_face
from mome_dist.transcription.model import Transcriber
from mome_dist.transcription.pauses import (
    Stretch,
    equal_stretches,
    speech_probabilities,
    stretches_of_speech,
    whole_pictures,
)
from mome_dist.transcription.results import LONGEST, Segment, Transcript, Transcription, Word, spread_words


def transcribe_film(
    model: Transcriber,
    path: str | Path,
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
        path: of an audio or video file.
        audio_rate, video_rate, num_beams, log_probs: as in `Transcriber.transcribe`.
        longest: seconds that are read at once.
        align: finds words in sound, as `mome_dist.transcription.words.WordAligner` does; used where sound is read.
        heard: is told how many seconds are done, and of how many.

    Raises:
        UserError: as `Transcriber.transcribe`; or a film of one part shows no face.
    """
    view = view_of(audio_rate, video_rate)
    check_view(model.run.config, view, "rates")
    reading = _Reading(model, Path(path), view, longest)
    segments: list[Segment] = []
    parts = reading.parts()
    while batch := list(islice(parts, model.run.config.decoding.batch_size)):
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
    return Transcript(Path(path), reading.seconds, tuple(segments), tuple(reading.notes))


class _Part(NamedTuple):
    stretch: Stretch
    clip: Clip
    view: View


def _segment(part: _Part, said: Transcription, align: Callable[[Audio, str], Sequence[Word]] | None) -> Segment:
    start, end = part.stretch
    if align is None or part.clip.audio is None:
        return Segment(start, end, said, spread_words(said.text, start, end), aligned=False)
    found = align(np.asarray(part.clip.audio), said.text)
    words = tuple(Word(word.text, start + word.start, start + word.end) for word in found)
    return Segment(start, end, said, words, aligned=True)


class _Reading:
    """A film that is being read: its sound at once, its pictures part by part."""

    def __init__(self, model: Transcriber, path: Path, view: View, longest: float) -> None:
        self._config, self._path, self._view = model.run.config, path, view
        self._streams = streams_read([view])
        film = film_with(path, self._streams)
        if "audio" not in self._streams and film.frames / FPS > longest:
            film = Film(path)  # its sound says where to cut
        self._film, self._audio = film, film.audio()
        self.seconds = max(film.frames / FPS, len(self._audio) / SAMPLE_RATE)
        self.notes = [*film.notes]
        self._whole = self.seconds <= longest
        self._stretches = self._cut(longest)

    def _cut(self, longest: float) -> list[Stretch]:
        listens = "audio" in self._streams
        if self._whole and not listens:
            return [Stretch(0.0, self.seconds)]
        spoken = stretches_of_speech(speech_probabilities(self._audio), self.seconds, longest)
        if self._whole and spoken:
            return [Stretch(0.0, self.seconds)]
        if not spoken and listens:
            self.notes.append("nobody speaks in it")
        if not spoken and not listens:
            return equal_stretches(self.seconds, longest)
        return spoken

    def parts(self) -> Iterator[_Part]:
        """What is to be transcribed, in order; a batch of them is held at a time."""
        mouths = iter(self._mouths())
        for stretch in self._stretches:
            audio = self._sound(stretch) if "audio" in self._streams else None
            view = self._view
            video = next(mouths) if "video" in self._streams else None
            if isinstance(video, NoFaceError):
                if self._whole:
                    raise no_face(self._path, video) from video
                if not self._reads_by_ear(stretch, video):
                    continue
                view, video = view_of(self._view.audio_rate, None), None
            yield _Part(stretch, Clip(audio, video), view)

    def _reads_by_ear(self, stretch: Stretch, why: NoFaceError) -> bool:
        """Whether a part without a face can be read by its sound alone; a note says what becomes of it."""
        try:
            check_view(self._config, view_of(self._view.audio_rate, None), "rates")
            told = "read by its sound alone"
        except UserError:
            told = "left out"
        self.notes.append(f"{stretch.start:.2f} to {stretch.end:.2f} s: {why}: {told}")
        return told != "left out"

    def _sound(self, stretch: Stretch) -> Audio:
        if self._whole:
            return self._audio
        first, last = (whole_pictures(time) * SAMPLES_PER_FRAME for time in stretch)
        return self._audio[first:last]

    def _mouths(self) -> Iterator[Video | NoFaceError]:
        if "video" not in self._streams or not self._stretches:
            return
        geometry = expected_geometry(self._config.video_encoder.path) or AVHUBERT
        frames = self._film.frames
        ranges = [(min(whole_pictures(a), frames), min(whole_pictures(b), frames)) for a, b in self._stretches]
        seen = mouth_crops(self._film, [each for each in ranges if each[0] < each[1]], FaceMesh, geometry=geometry)
        for first, last in ranges:
            yield next(seen) if first < last else NoFaceError("its pictures end before")
