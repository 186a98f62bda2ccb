"""One clip to utterances: read, find the mouth, cut, encode. Or the reasons why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mome_dist.data.films import Film
from mome_dist.data.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, Audio, Video, encode_flac, encode_video
from mome_dist.data.preparation.clips import TEST, Clip
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError
from mome_dist.data.preparation.segments import Segment, cut
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.text import Transcript, read_transcript, spell
from mome_dist.data.shards import EncodedUtterance
from mome_dist.errors import FilmError, UserError

UNREADABLE, NO_AUDIO, NO_VIDEO, NO_TEXT, LENGTHS, LISTED, TOO_LONG, NO_FACE, BAD_TIMES, HELD_OUT = (
    "unreadable",
    "no audio",
    "no video",
    "no text",
    "lengths differ",
    "not as listed",
    "too long",
    "no face",
    "bad word times",
    "held-out speaker",
)

_COUNTED_FRAMES = 2  # by how many pictures (and their sound) a film may differ from its list: codecs pad


class Rejection(NamedTuple):
    """A clip, or a segment of one, that is not in the corpus.

    ``reason`` is one of the constants above, ``detail`` a sentence with names and figures.
    """

    name: str
    split: str
    reason: str
    detail: str


class Note(NamedTuple):
    """What was done to a clip that is in the corpus, beyond decoding it."""

    name: str
    split: str
    note: str


@dataclass
class Prepared:
    """What became of one clip. ``frames`` counts those that were read."""

    utterances: list[EncodedUtterance] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    frames: int = 0


class _RejectedError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ClipPreparer:
    """Prepares clips, one after the other. The face mesh is loaded for the first clip that needs it."""

    def __init__(self, settings: PreparationSettings) -> None:
        self.settings = settings
        self._mesh: FaceMesh | None = None

    def prepare(self, clip: Clip) -> Prepared:
        """Utterances of a clip; what is wrong with the clip or a segment of it is told, not raised.

        Raises:
            UserError: MediaPipe is missing.
        """
        prepared = Prepared()
        try:
            self._prepare(clip, prepared)
        except (_RejectedError, FilmError) as error:
            reason = UNREADABLE if isinstance(error, FilmError) else error.reason
            return Prepared(rejections=[Rejection(clip.name, clip.split, reason, str(error))], frames=prepared.frames)
        return prepared

    def _prepare(self, clip: Clip, prepared: Prepared) -> None:
        transcript = _transcript(clip)
        film = _film(clip)
        audio, notes = _sound(clip, film)
        prepared.frames = film.frames
        _check_lengths(clip, film, audio, self.settings.tolerance_seconds)
        frames = min(film.frames, round(len(audio) / SAMPLES_PER_FRAME)) or 1
        segments = _segments(clip, transcript, frames, self.settings.longest_frames(clip.split))
        parts, how = [segment[:2] for segment in segments], self.settings
        mouths = mouth_crops(film, parts, self._face_mesh, how.longest_gap, how.least_faces, how.geometry)
        for number, (segment, mouth) in enumerate(zip(segments, mouths, strict=True)):
            whole = len(segments) == 1 and segment[:2] == (0, frames)
            name, identity = (clip.name, clip.id) if whole else (f"{clip.name}#{number}", f"{clip.id}-{number:03d}")
            if isinstance(mouth, NoFaceError):
                prepared.rejections.append(Rejection(name, clip.split, NO_FACE, str(mouth)))
                continue
            sound = audio[segment.start * SAMPLES_PER_FRAME : segment.end * SAMPLES_PER_FRAME]
            sound = np.pad(sound, (0, len(mouth) * SAMPLES_PER_FRAME - len(sound)))
            prepared.utterances.append(_encode(clip, identity, segment, sound, mouth))
        prepared.notes += [Note(clip.name, clip.split, note) for note in notes if prepared.utterances]

    def _face_mesh(self) -> FaceMesh:
        self._mesh = self._mesh or FaceMesh()
        return self._mesh


def _encode(clip: Clip, identity: str, segment: Segment, audio: Audio, mouth: Video) -> EncodedUtterance:
    return EncodedUtterance(
        id=identity,
        text=segment.text,
        speaker=clip.speaker,
        samples=len(audio),
        frames=len(mouth),
        flac=encode_flac(audio),
        mp4=encode_video(mouth),
        metadata={"clip": clip.name, "start_frame": round(clip.start * FPS) + segment.start},
    )


def _transcript(clip: Clip) -> Transcript:
    if clip.text is not None:
        transcript = Transcript(spell(clip.text), None)
    else:
        assert clip.text_file is not None
        try:
            transcript = read_transcript(clip.text_file)
        except UserError as error:
            raise _RejectedError(NO_TEXT, str(error)) from error
    if not transcript.text:
        raise _RejectedError(NO_TEXT, f"{clip.text_file or clip.media}: its text is empty")
    return transcript


def _film(clip: Clip) -> Film:
    """The pictures of a clip, and its sound where that is in the same file."""
    streams = ("video",) if clip.audio is not None else ("audio", "video")
    film = Film(clip.media, streams, clip.start, clip.seconds)
    if not film.has_video:
        raise _RejectedError(NO_VIDEO, f"{clip.media} has no video stream")
    return film


def _sound(clip: Clip, film: Film) -> tuple[Audio, list[str]]:
    """The sound of a clip, and what was done to it."""
    source = film if clip.audio is None else Film(clip.audio, ("audio",), clip.start, clip.seconds)
    if not source.has_audio:
        raise _RejectedError(NO_AUDIO, f"{source.path} has no audio stream, and no other file has it")
    return source.audio(), list(dict.fromkeys([*film.notes, *source.notes]))


def _check_lengths(clip: Clip, film: Film, audio: Audio, tolerance_seconds: float) -> None:
    """Refuse what belongs to no text as a whole: sound and picture of unlike length, or other than the list says."""
    sound, picture = len(audio) / SAMPLE_RATE, film.frames / FPS
    told = f"{clip.media}: {sound:.2f} s of sound and {picture:.2f} s of picture"
    if abs(sound - picture) > tolerance_seconds or not film.frames:
        raise _RejectedError(LENGTHS, f"{told} (they may differ by {tolerance_seconds} s)")
    if film.picture_delay > tolerance_seconds:
        raise _RejectedError(
            LENGTHS, f"{told}, whose first one comes after {film.picture_delay:.2f} s (at most {tolerance_seconds} s)"
        )
    meant = None if clip.seconds is None else round((clip.start + clip.seconds) * FPS) - round(clip.start * FPS)
    for listed, found, unit, each in (
        (clip.listed_frames or meant, film.frames, "pictures", 1),
        (clip.listed_samples or (meant and meant * SAMPLES_PER_FRAME), len(audio), "samples", SAMPLES_PER_FRAME),
    ):
        if listed is not None and abs(listed - found) > _COUNTED_FRAMES * each:
            raise _RejectedError(LISTED, f"{clip.media}: {found} {unit}, its list says {listed}")


def _segments(clip: Clip, transcript: Transcript, frames: int, longest: int) -> list[Segment]:
    """The clip as a whole where it is short enough, else cut between words."""
    if frames <= longest:
        return [Segment(0, frames, transcript.text)]
    if clip.split == TEST or transcript.words is None:
        how = "test clips are never cut" if clip.split == TEST else "the times of its words are not known"
        raise _RejectedError(TOO_LONG, f"{clip.media}: {frames / FPS:.1f} s, at most {longest / FPS:.1f} s; {how}")
    try:
        segments = cut(transcript.words, frames, longest)
    except UserError as error:
        raise _RejectedError(BAD_TIMES, f"{clip.text_file}: {error}") from error
    if not segments:
        raise _RejectedError(NO_TEXT, f"{clip.text_file}: its table has no word")
    return segments


def held_out(clips: list[Clip]) -> Iterator[Rejection]:
    """What is said of clips whose speakers are in the validation split."""
    for clip in clips:
        yield Rejection(clip.name, clip.split, HELD_OUT, f"speaker {clip.speaker!r} is in the validation split")
