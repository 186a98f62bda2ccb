"""One clip to utterances: read, find the mouth, cut, encode. Or the reasons why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mome_dist.data.media import (
    FPS,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Audio,
    Media,
    Video,
    encode_flac,
    encode_video,
    read_media_file,
)
from mome_dist.data.preparation.clips import TEST, Clip
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError, crop_mouth, is_mouth_crop
from mome_dist.data.preparation.segments import Segment, cut
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.text import Transcript, read_transcript, spell
from mome_dist.data.shards import EncodedUtterance
from mome_dist.errors import UserError

UNREADABLE, NO_AUDIO, NO_VIDEO, NO_TEXT, LENGTHS, TOO_LONG, NO_FACE, BAD_TIMES, HELD_OUT = (
    "unreadable",
    "no audio",
    "no video",
    "no text",
    "lengths differ",
    "too long",
    "no face",
    "bad word times",
    "held-out speaker",
)


class Rejection(NamedTuple):
    """A clip, or a segment of one, that is not in the corpus.

    ``reason`` is one of the constants above, ``detail`` a sentence with names and figures.
    """

    name: str
    split: str
    reason: str
    detail: str


@dataclass
class Prepared:
    """What became of one clip. ``frames`` counts those that were read."""

    utterances: list[EncodedUtterance] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
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

        def reject(name: str, reason: str, detail: str) -> None:
            prepared.rejections.append(Rejection(name, clip.split, reason, detail))

        try:
            transcript = _transcript(clip)
            audio, video = _streams(clip, self.settings.tolerance_seconds)
            prepared.frames = len(video)
            segments = _segments(clip, transcript, len(video), self.settings.longest_frames(clip.split))
        except _RejectedError as error:
            reject(clip.name, error.reason, str(error))
            return prepared
        crop = self._cropper(video)
        for number, segment in enumerate(segments):
            whole = len(segments) == 1 and segment.end - segment.start == len(video)
            name, identity = (clip.name, clip.id) if whole else (f"{clip.name}#{number}", f"{clip.id}-{number:03d}")
            try:
                mouth = crop(segment)
            except NoFaceError as error:
                reject(name, NO_FACE, str(error))
                continue
            sound = audio[segment.start * SAMPLES_PER_FRAME : segment.end * SAMPLES_PER_FRAME]
            prepared.utterances.append(_encode(clip, identity, segment, sound, mouth))
        return prepared

    def _cropper(self, video: Video) -> Callable[[Segment], Video]:
        """What crops a segment's mouth. The face is followed through the whole clip first."""
        if is_mouth_crop(video):
            return lambda segment: video[segment.start : segment.end]
        self._mesh = self._mesh or FaceMesh()
        points = self._mesh.track(video)

        def crop(segment: Segment) -> Video:
            here = slice(segment.start, segment.end)
            return crop_mouth(video[here], points[here], self.settings.longest_gap)

        return crop


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


def _streams(clip: Clip, tolerance_seconds: float) -> tuple[Audio, Video]:
    """Sound and picture of a clip, of one length."""
    media = _read(clip)
    if media.video is None:
        raise _RejectedError(NO_VIDEO, f"{clip.media} has no video stream")
    if media.audio is None:
        raise _RejectedError(NO_AUDIO, f"{clip.media} has no audio stream, and no other file has it")
    first = round(clip.start * FPS)
    last = None if clip.seconds is None else first + round(clip.seconds * FPS)
    video = media.video[first:last]
    audio = media.audio[first * SAMPLES_PER_FRAME : None if last is None else last * SAMPLES_PER_FRAME]
    difference = len(audio) / SAMPLE_RATE - len(video) / FPS
    if abs(difference) > tolerance_seconds or not len(video):
        raise _RejectedError(
            LENGTHS,
            f"{clip.media}: {len(audio) / SAMPLE_RATE:.2f} s of sound and {len(video) / FPS:.2f} s of picture "
            f"(they may differ by {tolerance_seconds} s)",
        )
    frames = min(len(video), round(len(audio) / SAMPLES_PER_FRAME)) or 1
    video, audio = video[:frames], audio[: frames * SAMPLES_PER_FRAME]
    return np.pad(audio, (0, frames * SAMPLES_PER_FRAME - len(audio))), video


def _read(clip: Clip) -> Media:
    try:
        media = read_media_file(clip.media)
        if clip.audio is not None:
            media = Media(read_media_file(clip.audio).audio, media.video)
    except UserError as error:
        raise _RejectedError(UNREADABLE, str(error)) from error
    return media


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
