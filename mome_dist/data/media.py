"""The codecs of a corpus: FLAC speech and full-range grey H.264, in memory.

Corpora hold speech as 16 kHz mono 16-bit FLAC and mouth crops as 25 fps grey H.264 in MP4. H.264 stores luma either in
"limited" range (16-235) or "full" range (0-255); a stream that does not say is taken as limited, and every grey value
comes back scaled. So the writer hands the luma plane over untouched and marks the stream as full range, and the reader
takes the luma plane as it is, expanding it only where a foreign stream is of limited range.

Files of a user's own are read by `mome_dist.data.films`. Nothing here unpickles.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import cv2
import numpy as np
import soundfile
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from mome_dist.errors import DamagedDataError, UserError

SAMPLE_RATE = 16_000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS

VIDEO_CRF = 18
VIDEO_PRESET = "superfast"
_FULL_SCALE = 32768.0
_NEUTRAL_CHROMA = 128
# Luma of limited range (16 to 235) as full grey levels.
_EXPANDED = np.rint(np.clip((np.arange(256) - 16.0) * (255.0 / 219.0), 0.0, 255.0)).astype(np.uint8)

Audio = NDArray[np.float32]
Video = NDArray[np.uint8]


def frames_for_samples(samples: int) -> int:
    """Number of 25 fps video frames that cover ``samples`` audio samples at 16 kHz (rounded up)."""
    return -(-samples // SAMPLES_PER_FRAME)


# ---------------------------------------------------------------------------------------------------------------- audio


def encode_flac(audio: Audio) -> bytes:
    """Encode float32 [samples] in [-1, 1] as 16 kHz mono 16-bit FLAC. Values outside the range are clipped."""
    pcm = np.clip(np.rint(audio * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(data: bytes, source: str, samples: int | None = None) -> Audio:
    """Decode 16 kHz mono FLAC into float32 [samples] in [-1, 1].

    ``source`` names the data in errors. Raises DamagedDataError when the data is damaged or does not hold exactly
    ``samples`` samples, UserError when it has another rate or channel count.
    """
    try:
        pcm, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DamagedDataError(f"{source}: cannot decode FLAC audio ({error}); make the shard again") from error
    if rate != SAMPLE_RATE or pcm.shape[1] != 1:
        raise UserError(f"{source}: audio is {pcm.shape[1]} x {rate} Hz; store 16 kHz mono")
    if samples is not None and len(pcm) != samples:
        raise DamagedDataError(f"{source}: holds {len(pcm)} samples, the index says {samples}; make the shard again")
    return pcm[:, 0].astype(np.float32) / np.float32(_FULL_SCALE)


# ---------------------------------------------------------------------------------------------------------------- video


def _add_video_stream(container: av.container.OutputContainer, video: Video, crf: int, preset: str) -> av.VideoStream:
    if video.ndim != 3 or video.dtype != np.uint8 or len(video) == 0:
        raise ValueError(f"video must be uint8 [T, H, W] with T > 0, got {video.dtype} {list(video.shape)}")
    _, height, width = video.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 with 4:2:0 chroma needs even sizes, got {height}x{width}")
    # "fastdecode" leaves out arithmetic coding and deblocking: training decodes each clip many times.
    options = {"crf": str(crf), "preset": preset, "tune": "fastdecode", "threads": "1"}
    stream = container.add_stream("libx264", rate=FPS, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.color_range = ColorRange.JPEG
    return stream


def _mux_video(container: av.container.OutputContainer, stream: av.VideoStream, video: Video) -> None:
    _, height, width = video.shape
    planes = np.full((height * 3 // 2, width), _NEUTRAL_CHROMA, np.uint8)
    for index, image in enumerate(video):
        planes[:height] = image
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.color_range = ColorRange.JPEG
        frame.pts = index
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def encode_video(video: Video, crf: int = VIDEO_CRF, preset: str = VIDEO_PRESET) -> bytes:
    """Encode grey uint8 [T, H, W] (H and W even) as a silent 25 fps full-range H.264 MP4. Same input, same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = _add_video_stream(container, video, crf, preset)
        _mux_video(container, stream, video)
    return buffer.getvalue()


def grey_levels(frame: av.VideoFrame) -> Video:
    """Grey levels 0-255 of a frame, whatever its format and range: uint8 [H, W]."""
    name = frame.format.name
    if not (
        name == "gray" or (name.startswith("yuv") and frame.format.components[0].bits == 8 and len(frame.planes) == 3)
    ):
        # Packed RGB, palettes, 10-bit and so on: libswscale knows their ranges.
        return frame.to_ndarray(format="gray").astype(np.uint8, copy=False)
    plane = frame.planes[0]
    luma = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    full_range = name == "gray" or name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    if full_range:
        return luma
    return cv2.LUT(luma, _EXPANDED).astype(np.uint8, copy=False)


def decode_video(data: bytes, source: str, frames: int | None = None) -> Video:
    """Decode a silent grey clip into uint8 [T, H, W].

    ``source`` names the data in errors. Raises DamagedDataError when the data is damaged or does not hold exactly
    ``frames``.
    """
    try:
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a mouth crop is too small to split over threads
            images = [grey_levels(frame) for frame in container.decode(stream)]
    except (av.FFmpegError, IndexError) as error:
        raise DamagedDataError(f"{source}: cannot decode H.264 video ({error}); make the shard again") from error
    if not images or (frames is not None and len(images) != frames):
        raise DamagedDataError(f"{source}: holds {len(images)} frames, the index says {frames}; make the shard again")
    return np.stack(images)


# ------------------------------------------------------------------------------------------------------------ one file


def write_media_file(path: Path, audio: Audio, video: Video) -> None:
    """Write one MP4 with both streams: AAC from float32 [samples] at 16 kHz, H.264 from uint8 [T, H, W] at 25 fps."""
    with av.open(str(path), "w", format="mp4") as container:
        picture = _add_video_stream(container, video, VIDEO_CRF, "medium")
        sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"b": "96k"})
        _mux_video(container, picture, video)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio[None], np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
