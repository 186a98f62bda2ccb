"""A film on its way into a model: cut at pauses, with the mouth that speaks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from mome_dist.config import RunConfig
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
from mome_dist.transcription.pauses import (
    Stretch,
    equal_stretches,
    speech_probabilities,
    stretches_of_speech,
    whole_pictures,
)
from mome_dist.transcription.results import LONGEST


class Part(NamedTuple):
    """A stretch of a film, and the view that it can be read at."""

    stretch: Stretch
    clip: Clip
    view: View


class FilmReading:
    """A film that is being read: its sound at once, its pictures part by part, as a model of some configuration wants.

    Args:
        config: of the model.
        path: of an audio or video file.
        view: that it will be read at.
        longest: seconds that are read at once; a longer film is cut at pauses.

    Attributes:
        path: of the film.
        view: that it is read at.
        seconds: its length.
        notes: what a reader should know of it; all of them are there once `parts` has ended.

    Raises:
        UserError: the file cannot be read, or lacks a stream.
    """

    def __init__(self, config: RunConfig, path: str | Path, view: View, longest: float = LONGEST) -> None:
        self.path, self.view = Path(path), view
        self._config = config
        self._streams = streams_read([view])
        film = film_with(self.path, self._streams)
        if "audio" not in self._streams and film.frames / FPS > longest:
            film = Film(self.path)  # its sound says where to cut
        self._film, self._audio = film, film.audio()
        self.seconds = max(film.frames / FPS, len(self._audio) / SAMPLE_RATE)
        self.notes = [*film.notes]
        self._whole = self.seconds <= longest
        self._stretches = self._cut(longest)
        self._parts = self._read()

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

    def begin(self) -> FilmReading:
        """Read the first part now: what is wrong with a short film is told before a model is loaded for it."""
        first = list(islice(self._parts, 1))
        self._parts = chain(first, self._parts)
        return self

    def parts(self) -> Iterator[Part]:
        """What is to be transcribed, in order, once.

        Raises:
            UserError: it cannot be decoded; or a film of one part shows no face.
        """
        return self._parts

    def _read(self) -> Iterator[Part]:
        mouths = iter(self._mouths())
        for stretch in self._stretches:
            audio = self._sound(stretch) if "audio" in self._streams else None
            view = self.view
            video = next(mouths) if "video" in self._streams else None
            if isinstance(video, NoFaceError):
                if self._whole:
                    raise no_face(self.path, video) from video
                if not self._reads_by_ear(stretch, video):
                    continue
                view, video = view_of(self.view.audio_rate, None), None
            yield Part(stretch, Clip(audio, video), view)

    def _reads_by_ear(self, stretch: Stretch, why: NoFaceError) -> bool:
        """Whether a part without a face can be read by its sound alone; a note says what becomes of it."""
        try:
            check_view(self._config, view_of(self.view.audio_rate, None), "rates")
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
