"""One file on one clock: its best audio and video stream, or the one of them that is asked for.

The clock starts where the earlier of the streams that are read starts, so that a delay between them survives and
nothing that is said is cut off; where pictures start later, the first one stands for what is missing. A stream that is
not asked for is not decoded, and no more than a picture is held at a time: a film of an hour takes the memory of its
sound.

PyAV decodes, whose wheels bring FFmpeg: torchcodec wants one of the system, and has no side data and no packets, from
which the clock and the pictures' orientation are read here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.stream import Discard, Disposition

from mome_dist.data.films.pictures import Picture, at_25_fps, stacked
from mome_dist.data.films.sound import SoundTrack, sound_range
from mome_dist.data.media import FPS, SAMPLES_PER_FRAME, Audio, Video
from mome_dist.errors import FilmError, UserError, no_file

# Containers that store the time of every frame and an index, and say how long they are: in these a part is found
# without decoding what is before it, and an end that is missing is noticed.
_MATROSKA = "matroska"
_INDEXED = ("mov", _MATROSKA)
_PRE_ROLL_SECONDS = 1.0  # decoded before a part and thrown away: codecs need a little to settle
_MISSING_SECONDS = 0.5  # by how much a stream may end before the length that its file promises

Frame = TypeVar("Frame", av.AudioFrame, av.VideoFrame)
_AVStream = av.AudioStream | av.VideoStream


class _Stream(NamedTuple):
    """What the packets of a stream tell: times in seconds on the file's own clock."""

    number: int
    start: float
    end: float
    pixel_shape: float


class Film:
    """An audio or video file of any container and codec that FFmpeg knows, or a part of one.

    Making one reads what the file says of itself; nothing is decoded yet.

    Args:
        path: a local file.
        streams: which of "audio" and "video" to read.
        start, seconds: the part to read, on the film's clock, to whole pictures; by default all of it.

    Attributes:
        frames: pictures of the part at 25 a second; 0 without video.
        picture_delay: seconds of the part before its first picture.
        notes: what was done to it beyond decoding, in words; of the sound after `audio`.

    Raises:
        FilmError: the path is no file, cannot be read, holds neither audio nor video, or ends before its own length.
    """

    def __init__(
        self,
        path: str | Path,
        streams: Collection[str] = ("audio", "video"),
        start: float = 0.0,
        seconds: float | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FilmError(f"{path} {no_file(path)}; give the path of one audio or video file")
        self.notes: list[str] = []
        found = _scan(self.path, streams)
        self._sound, self._video = found.get("audio"), found.get("video")
        origin = min((stream.start for stream in found.values()), default=0.0)
        first, last = round(start * FPS), None if seconds is None else round((start + seconds) * FPS)
        self._start = origin + first / FPS
        self._samples = None if last is None else (last - first) * SAMPLES_PER_FRAME
        self.frames, self.picture_delay = 0, 0.0
        if self._video is not None:
            total = max(math.ceil((self._video.end - origin) * FPS - 0.5), 1)
            self.frames = max((total if last is None else min(total, last)) - first, 0)
            self.picture_delay = max(self._video.start - self._start, 0.0)
            if self.picture_delay > 1 / FPS:
                self.notes.append(
                    f"its first picture comes after {self.picture_delay:.2f} s and stands for those before"
                )

    @property
    def has_audio(self) -> bool:
        """Whether there is any sound, and it was asked for."""
        return self._sound is not None

    @property
    def has_video(self) -> bool:
        """Whether there are pictures, and they were asked for."""
        return self._video is not None

    def audio(self) -> Audio:
        """Sound of the part, float32 [samples] at 16 kHz in [-1, 1]; none where there is none.

        Sound above full scale, as float recordings and lossy codecs may hold, is turned down as a whole, and noted.

        Raises:
            FilmError: it cannot be decoded, samples are no numbers, or its time stamps are those of no recording.
        """
        if self._sound is None:
            return np.zeros(0, np.float32)
        frames = _decoded(self.path, self._sound, self._start, av.AudioFrame)
        audio = SoundTrack(self._start, self._samples, str(self.path)).read(frames)
        if (loudest := sound_range(audio, str(self.path))) > 1.0:
            audio /= np.float32(loudest)
            self.notes.append(f"its sound, up to {loudest:.3g} times full scale, was turned down")
        return audio

    def pictures(self) -> Iterator[Picture]:
        """Grey levels of the part, ``frames`` pictures of uint8 [height, width], one after the other.

        Raises:
            FilmError: they cannot be decoded, or fewer than the file promises.
        """
        if self._video is None:
            return
        decoded = _decoded(self.path, self._video, self._start, av.VideoFrame)
        given = 0
        for picture in at_25_fps(decoded, self._start, self._video.pixel_shape, str(self.path)):
            if given == self.frames:
                return
            yield picture
            given += 1
        if given < self.frames:
            raise FilmError(
                f"{self.path}: only {given} of {self.frames} pictures can be decoded; it is damaged, fetch it again"
            )

    def video(self) -> Video:
        """All pictures of the part at once, uint8 [frames, height, width]."""
        return stacked(self.pictures(), self.frames)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file; what FFmpeg says against it is told as a user's mistake."""
    try:
        # Opened as a stream of bytes: no name in the path or in a playlist can make FFmpeg open anything else.
        with path.open("rb") as file, av.open(file, "r", options={"protocol_whitelist": "file"}) as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        raise FilmError(
            f"{path}: cannot be read as audio or video ({error}); convert it to MP4, WAV or FLAC"
        ) from error


def _chosen(container: av.container.InputContainer) -> dict[str, _AVStream]:
    """The streams that a player would choose, by kind; a cover picture is no film."""
    best = (container.streams.best("video"), container.streams.best("audio"))
    return {
        stream.type: stream
        for stream in best
        if isinstance(stream, _AVStream) and not stream.disposition & Disposition.attached_pic
    }


def _read_only(container: av.container.InputContainer, streams: Collection[_AVStream]) -> None:
    """Let the demuxer pass over all other streams."""
    for stream in container.streams:
        stream.discard = Discard.default if stream in streams else Discard.all


def _scan(path: Path, wanted: Collection[str]) -> dict[str, _Stream]:
    """What the packets of the wanted streams tell, by kind; a stream without any is left out.

    Raises:
        FilmError: the file has neither audio nor video, or ends before the length that it promises.
    """
    with _opened(path) as container:
        chosen = _chosen(container)
        if not chosen:
            raise FilmError(f"{path}: holds neither an audio nor a video stream; give a file with speech in it")
        # Matroska promises a length for the whole file, others for each stream.
        whole = container.duration if container.format.name.startswith(_MATROSKA) else None
        streams = {kind: stream for kind, stream in chosen.items() if whole or kind in wanted}
        if not streams:
            return {}
        _read_only(container, streams.values())
        spans = {kind: _Span(stream) for kind, stream in streams.items()}
        for packet in container.demux(*streams.values()):
            spans[packet.stream.type].add(packet)
        found = {kind: stream for kind, span in spans.items() if (stream := span.found()) is not None}
        promised = {kind: span.promised for kind, span in spans.items() if kind in found and span.promised is not None}
        if whole and found:
            promised = {max(found, key=lambda kind: found[kind].end): whole / av.time_base}
    for kind, end in promised.items():
        if end - found[kind].end > _MISSING_SECONDS:
            raise FilmError(
                f"{path}: its {kind} ends at {found[kind].end:.2f} s, though it should be {end:.2f} s long; it was cut "
                "off, fetch it again"
            )
    return {kind: stream for kind, stream in found.items() if kind in wanted}


class _Span:
    """From when to when the packets of a stream last, in seconds on the file's clock."""

    def __init__(self, stream: _AVStream) -> None:
        self._number, self._tick = stream.index, float(stream.time_base or 1)
        self._start = None if stream.start_time is None else stream.start_time * self._tick
        self._end: float | None = None
        self._pixel_shape, self._usual = 1.0, 1 / FPS
        if isinstance(stream, av.VideoStream):
            self._pixel_shape = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
            self._usual = 1 / float(stream.average_rate or FPS)
        indexed = stream.container.format.name.startswith(_INDEXED)
        self.promised = stream.duration * self._tick + (self._start or 0.0) if stream.duration and indexed else None

    def add(self, packet: av.Packet) -> None:
        if not packet.size or packet.is_discard:
            return
        time = packet.dts if packet.pts is None else packet.pts
        begins = time * self._tick if time is not None else self._end or 0.0
        lasts = packet.duration * self._tick if packet.duration else self._usual
        self._start = begins if self._start is None else self._start
        self._end = begins + lasts if self._end is None else max(self._end, begins + lasts)

    def found(self) -> _Stream | None:
        if self._start is None or self._end is None:
            return None
        return _Stream(self._number, self._start, self._end, self._pixel_shape)


def _decoded(path: Path, wanted: _Stream, time: float, kind: type[Frame]) -> Iterator[Frame]:
    """Frames of a stream in the order in which they are played, from before ``time`` on, or from its start."""
    early = time - _PRE_ROLL_SECONDS
    if early > wanted.start:
        with _opened(path) as container:
            stream = container.streams[wanted.number]
            if container.format.name.startswith(_INDEXED) and stream.time_base:
                container.seek(int(early / stream.time_base), stream=stream)
                frames = _frames(container, wanted, kind)
                first = next(frames, None)
                # Some indexes lead astray; then all is decoded from the start.
                if first is not None and first.time is not None and first.time <= early + _PRE_ROLL_SECONDS / 2:
                    yield first
                    yield from frames
                    return
    with _opened(path) as container:
        yield from _frames(container, wanted, kind)


def _frames(container: av.container.InputContainer, wanted: _Stream, kind: type[Frame]) -> Iterator[Frame]:
    stream = container.streams[wanted.number]
    assert isinstance(stream, av.AudioStream | av.VideoStream)
    _read_only(container, [stream])
    for frame in container.decode(stream):
        assert isinstance(frame, kind)
        yield frame


def film_with(path: str | Path, streams: Sequence[str]) -> Film:
    """The film of a path, which has to have all of these streams; nothing is decoded yet.

    Raises:
        UserError: as `Film`, or a stream is missing.
    """
    film = Film(path, streams)
    for stream, there in (("audio", film.has_audio), ("video", film.has_video)):
        if stream in streams and not there:
            raise UserError(
                f"{path} has no {stream} stream: leave out --{stream}-rate ({stream}_rate in Python), or give a file "
                "that has one."
            )
    return film
