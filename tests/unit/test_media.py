"""Codecs: full grey range, exact lengths, one clock for sound and picture, errors that name file and fix."""

from __future__ import annotations

import io
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import soundfile

from mome_dist.data import media
from mome_dist.errors import UserError


def moving_picture(frames: int, seed: int = 0) -> media.Video:
    """Smooth grey waves that use the whole range 0-255, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    wave = np.stack([np.sin(x / 15 + t / 9) * np.cos(y / 11 - t / 7) for t in range(frames)])
    return np.clip(128 + 127 * 1.1 * wave + rng.normal(0, 1.5, wave.shape), 0, 255).astype(np.uint8)


def noise_burst(samples: int, seed: int = 0) -> media.Audio:
    """White noise: its autocorrelation has one peak, so that delays can be measured."""
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def test_flac_keeps_16_bits_and_is_what_soundfile_reads() -> None:
    audio = np.clip(noise_burst(5000) * 5, -1.2, 1.2)
    data = media.encode_flac(audio)
    decoded = media.decode_flac(data, "x", 5000)
    independent, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 16_000
    np.testing.assert_array_equal(decoded, independent)
    np.testing.assert_allclose(decoded, np.clip(audio, -1, 1), atol=1.01 / 32768)


def test_flac_errors() -> None:
    data = media.encode_flac(noise_burst(1000))
    with pytest.raises(UserError, match="1000 samples, the index says 999"):
        media.decode_flac(data, "shard: a.flac", 999)
    with pytest.raises(UserError, match=r"shard: a\.flac: cannot decode"):
        media.decode_flac(b"nonsense", "shard: a.flac")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((100, 2), np.float32), 8000, format="FLAC")
    with pytest.raises(UserError, match="2 x 8000 Hz"):
        media.decode_flac(buffer.getvalue(), "a")


def test_video_keeps_the_grey_range_and_every_frame() -> None:
    video = moving_picture(33)
    data = media.encode_video(video)
    assert data == media.encode_video(video)
    decoded = media.decode_video(data, "x", 33)
    assert decoded.shape == video.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - video).mean() < 3
    slope, offset = np.polyfit(video.ravel().astype(float), decoded.ravel().astype(float), 1)
    assert abs(slope - 1) < 0.01
    assert abs(offset) < 1
    assert decoded.min() < 4
    assert decoded.max() > 251


def test_opencv_reads_the_same_grey_levels(tmp_path: Path) -> None:
    video = moving_picture(5)
    path = tmp_path / "a.mp4"
    path.write_bytes(media.encode_video(video))
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == 25
    images = [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2GRAY) for _ in range(5)]
    assert np.abs(np.stack(images).astype(int) - media.decode_video(path.read_bytes(), "x")).mean() < 1


def test_video_errors() -> None:
    data = media.encode_video(moving_picture(4))
    with pytest.raises(UserError, match="holds 4 frames, the index says 5"):
        media.decode_video(data, "shard: a.mp4", 5)
    with pytest.raises(UserError, match=r"shard: a\.mp4: cannot decode"):
        media.decode_video(data[: len(data) // 3], "shard: a.mp4")
    with pytest.raises(ValueError, match="even"):
        media.encode_video(np.zeros((2, 95, 96), np.uint8))
    with pytest.raises(ValueError, match="T > 0"):
        media.encode_video(np.zeros((0, 96, 96), np.uint8))


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (640, 1), (641, 2), (16_000, 25)])
def test_frames_for_samples(samples: int, frames: int) -> None:
    assert media.frames_for_samples(samples) == frames


def test_written_streams_say_that_they_are_full_range(tmp_path: Path) -> None:
    with av.open(io.BytesIO(media.encode_video(moving_picture(2)))) as container:
        assert container.streams.video[0].codec_context.color_range == 2  # AVCOL_RANGE_JPEG
