"""Films for tests, written frame by frame: any codec, container, time stamps and metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import av
import numpy as np

from mome_dist.data.media import SAMPLE_RATE, Audio, Video

BLOCK = 1024  # samples of a frame of sound
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def moving_picture(frames: int, seed: int = 0) -> Video:
    """Smooth grey waves that use the whole range 0-255, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    wave = np.stack([np.sin(x / 15 + t / 9) * np.cos(y / 11 - t / 7) for t in range(frames)])
    return np.clip(128 + 127 * 1.1 * wave + rng.normal(0, 1.5, wave.shape), 0, 255).astype(np.uint8)


def noise_burst(samples: int, seed: int = 0) -> Audio:
    """White noise: its autocorrelation has one peak, so that delays can be measured."""
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def delay_of(part: Audio, whole: Audio) -> int:
    """The sample of ``whole`` where ``part`` lies in it."""
    return int(np.correlate(whole, part, "valid").argmax())


def write_film(
    path: Path,
    video: Video | None = None,
    audio: Audio | None = None,
    *,
    codec: str = "ffv1",
    pixels: str = "gray",
    rate: int = 25,
    sound_codec: str = "pcm_f32le",
    picture_time: Callable[[float], float] = lambda seconds: seconds,
    sound_time: Callable[[float], float] = lambda seconds: seconds,
    prepare: Callable[[av.VideoStream], object] = lambda stream: None,
) -> Path:
    """Let libav encode grey pictures and sound in its own way, not in that of the tested modules.

    Args:
        video: uint8 [frames, height, width].
        audio: float32 [samples] or [channels, samples] at 16 kHz.
        picture_time, sound_time: time stamp in seconds of a packet, by when it would be due.
        prepare: sets metadata of the stream of pictures.
    """
    with av.open(str(path), "w") as container:
        streams: list[tuple[av.VideoStream | av.AudioStream, Iterable[av.VideoFrame | av.AudioFrame]]] = []
        if video is not None:
            picture = container.add_stream(codec, rate=rate, options={"qscale": "2"})
            assert isinstance(picture, av.VideoStream)
            picture.height, picture.width, picture.pix_fmt = video.shape[1], video.shape[2], pixels
            prepare(picture)
            streams.append((picture, _pictures(video, pixels)))
        if audio is not None:
            audio = np.atleast_2d(audio).astype(np.float32)
            sound = container.add_stream(sound_codec, rate=SAMPLE_RATE, layout=_LAYOUTS[len(audio)])
            assert isinstance(sound, av.AudioStream)
            streams.append((sound, _blocks(audio)))
        packets = []
        for stream, frames in streams:
            time_of = picture_time if stream.type == "video" else sound_time
            for packet in [packet for frame in [*frames, None] for packet in stream.encode(frame)]:  # type: ignore[arg-type]
                assert packet.pts is not None and packet.dts is not None
                due = float(packet.pts * packet.time_base)
                shift = round((time_of(due) - due) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packets.append(packet)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    return path


def _pictures(video: Video, pixels: str) -> Iterable[av.VideoFrame]:
    for number, image in enumerate(video):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="gray").reformat(format=pixels)
        frame.pts = number
        yield frame


def _blocks(audio: Audio) -> Iterable[av.AudioFrame]:
    for start in range(0, audio.shape[1], BLOCK):
        block = np.ascontiguousarray(audio[:, start : start + BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[len(audio)])
        frame.sample_rate, frame.pts = SAMPLE_RATE, start
        yield frame
