"""Sound of a file of any format as 16 kHz mono, every sample at the time that its file gives it.

Frames of sound follow each other without a gap, whatever their time stamps say to the millisecond: stamps are rounded
and jitter. Where they leave that line for good, the recording has a hole (or sound twice), and what follows belongs at
its own time. So frames are read as runs: within one, sound is continuous; between two there is silence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.audio.resampler import AudioResampler

from mome_dist.data.media import SAMPLE_RATE, Audio
from mome_dist.errors import FilmError

# A hole: so many frames in a row are off the run by more than a picture, all on the same side.
_OFF_SECONDS = 0.04
_IN_A_ROW = 3
# What no recording has. Beyond these a film's clock cannot be trusted, and silence of that length would fill memory.
LONGEST_HOLE_SECONDS = 600.0
LONGEST_OVERLAP_SECONDS = 1.0
_CANCELLED = 1e-3  # power of the mean of the channels, relative to their own mean power

REMUX = "write it anew, such as with 'ffmpeg -i OLD NEW.mkv'"


class SoundTrack:
    """Collects frames of sound into float32 [samples] at 16 kHz: the mean of the channels.

    Libswresample's own down-mix is louder, and clips.

    Args:
        origin: time in seconds, on the file's clock, of the first sample.
        samples: stop there; None for all.
        source: names the file in errors.
    """

    def __init__(self, origin: float, samples: int | None, source: str) -> None:
        self._origin, self._wanted, self._source = origin, samples, source
        self._kept = bytearray()  # grows in place: an hour of sound is never held twice
        self._skip = 0
        self._resampler: AudioResampler | None = None
        self._format: tuple[str, str, int] | None = None
        self._power_of_channels = self._power_of_mean = 0.0

    def __len__(self) -> int:
        return len(self._kept) // 4

    def read(self, frames: Iterable[av.AudioFrame]) -> Audio:
        """All sound of these frames.

        Raises:
            FilmError: the time stamps are those of no recording, or the channels cancel each other.
        """
        for frame, start in _runs(frames):
            if start is not None:
                self._flush()
                self._move_to(start)
            self._add(frame)
            if self._wanted is not None and len(self) >= self._wanted:
                break
        self._flush()
        if self._power_of_mean < _CANCELLED * self._power_of_channels:
            raise FilmError(
                f"{self._source}: its channels cancel each other, and their mean is silence; turn one of them round or "
                "keep one alone"
            )
        return np.frombuffer(self._kept, np.float32)[: self._wanted]

    def _move_to(self, start: float) -> None:
        """Continue at a time: after silence, or leaving out what is before it."""
        gap = round((start - self._origin) * SAMPLE_RATE) - len(self)
        if gap > LONGEST_HOLE_SECONDS * SAMPLE_RATE or (len(self) and gap < -LONGEST_OVERLAP_SECONDS * SAMPLE_RATE):
            raise FilmError(
                f"{self._source}: the time stamps of its sound jump by {gap / SAMPLE_RATE:+.2f} s at "
                f"{len(self) / SAMPLE_RATE:.2f} s; {REMUX}"
            )
        self._kept += bytes(4 * max(gap, 0))
        self._skip = max(-gap, 0)

    def _add(self, frame: av.AudioFrame) -> None:
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self._format:  # some streams change it on their way
            self._flush()
            self._format = form
        if self._resampler is None:
            self._resampler = AudioResampler(format="fltp", rate=SAMPLE_RATE)
        frame.pts = None  # the resampler must not stretch or drop anything over uneven time stamps
        self._keep(self._resampler.resample(frame))

    def _flush(self) -> None:
        """Take what the resampler holds back. The next frame gets a new one."""
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
            self._resampler = None

    def _keep(self, pieces: Iterable[av.AudioFrame]) -> None:
        for piece in pieces:
            channels = piece.to_ndarray().astype(np.float32, copy=False)
            mean = channels.mean(0)
            skipped = min(self._skip, len(mean))
            self._skip -= skipped
            self._kept += mean[skipped:].tobytes()
            if len(channels) > 1:
                self._power_of_channels += float(np.square(channels).mean(0).sum())
                self._power_of_mean += float(np.square(mean).sum())


def _runs(frames: Iterable[av.AudioFrame]) -> Iterator[tuple[av.AudioFrame, float | None]]:
    """Each frame, with its time in seconds where a run begins with it."""
    source, ahead = iter(frames), deque[av.AudioFrame]()
    expected: float | None = None
    while True:
        while len(ahead) < _IN_A_ROW and (following := next(source, None)) is not None:
            ahead.append(following)
        if not ahead:
            return
        start = None
        if expected is None or _leave(ahead, expected):
            start = _seconds(ahead[0])
            expected = start if start is not None else expected or 0.0
        frame = ahead.popleft()
        expected += frame.samples / frame.sample_rate
        yield frame, start


def _leave(frames: Iterable[av.AudioFrame], expected: float) -> bool:
    """Whether all these frames are off where they would follow each other, on the same side."""
    later = set()
    for frame in frames:
        time = _seconds(frame)
        if time is None or abs(time - expected) <= _OFF_SECONDS:
            return False
        later.add(time > expected)
        expected += frame.samples / frame.sample_rate
    return len(later) == 1


def _seconds(frame: av.AudioFrame) -> float | None:
    return None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)


def sound_range(audio: Audio, source: str) -> float:
    """Check that all samples are numbers; return the largest magnitude. The same for every kind of recording.

    Raises:
        FilmError: some are NaN or infinite.
    """
    if not len(audio):
        return 0.0
    if not np.isfinite(audio.sum(dtype=np.float64)):  # one bad sample makes the sum bad; no copy of the whole
        bad = len(audio) - int(np.isfinite(audio).sum())
        raise FilmError(f"{source}: {bad} of {len(audio)} samples are NaN or infinite; write the recording anew")
    return max(float(audio.max()), -float(audio.min()))


def resample_audio(audio: Audio, rate: int, source: str) -> Audio:
    """Resample float32 [samples] from ``rate`` Hz to 16 kHz with libswresample; ``source`` names it in errors.

    Raises:
        FilmError: some samples are NaN or infinite.
    """
    sound_range(audio, source)
    if rate == SAMPLE_RATE:
        return audio
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio[None], np.float32), format="fltp", layout="mono")
    frame.sample_rate = rate
    return SoundTrack(0.0, None, source).read([frame])
