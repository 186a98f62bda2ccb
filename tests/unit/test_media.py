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


def write_with_libav(path: Path, video: media.Video, codec: str, pixels: str, rate: int = 25) -> None:
    """Let libav encode grey pictures in its own way: conversion and range are not those of the tested module."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"qscale": "2"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], pixels
        for index, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="gray").reformat(format=pixels)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


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


def test_read_media_file_returns_both_streams_in_step(tmp_path: Path) -> None:
    video, audio = moving_picture(50), noise_burst(32_000)
    path = tmp_path / "both.mp4"
    media.write_media_file(path, audio, video)
    read = media.read_media_file(path)
    assert read.video is not None
    assert read.audio is not None
    assert read.video.shape == video.shape
    assert np.abs(read.video.astype(int) - video).mean() < 3
    assert 0 <= len(read.audio) - 32_000 < 2048  # AAC fills its last block
    lag = np.correlate(read.audio[4000:20_000], audio[6000:16_000], "valid").argmax() - 2000
    assert abs(int(lag)) <= 16  # 1 ms


def test_read_media_file_keeps_a_delay_of_the_sound(tmp_path: Path) -> None:
    whole, late = tmp_path / "a.mp4", tmp_path / "b.mkv"
    audio = noise_burst(16_000)
    media.write_media_file(whole, audio, moving_picture(50))
    with av.open(str(whole)) as source, av.open(str(late), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None or packet.pts is None:
                continue
            if packet.stream.type == "audio":
                delay = round(0.5 / packet.time_base)
                packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    read = media.read_media_file(late).audio
    assert read is not None
    lag = np.correlate(read[4000:24_000], audio[2000:10_000], "valid").argmax() + 4000 - 2000
    assert abs(int(lag) - 8000) <= 16


@pytest.mark.parametrize(
    ("codec", "pixels"), [("libx264", "yuv420p"), ("ffv1", "gray"), ("ffv1", "bgr0"), ("mjpeg", "yuvj420p")]
)
def test_read_media_file_knows_every_grey_range(tmp_path: Path, codec: str, pixels: str) -> None:
    """A picture that libav wrote in limited range, grey, RGB or full range comes back as it went in."""
    video = moving_picture(6)
    path = tmp_path / "a.mkv"
    write_with_libav(path, video, codec, pixels)
    read = media.read_media_file(path)
    assert read.audio is None
    assert read.video is not None
    slope, offset = np.polyfit(video.ravel().astype(float), read.video.ravel().astype(float), 1)
    assert abs(slope - 1) < 0.01
    assert abs(offset) < 1.5


def test_read_media_file_brings_other_frame_rates_to_25(tmp_path: Path) -> None:
    """Every picture carries its time as its grey level; at 25 fps the level must follow the same time."""
    path = tmp_path / "a.mkv"
    levels = np.arange(0, 240, 4)  # 60 pictures at 30 fps: two seconds
    video = np.broadcast_to(levels[:, None, None].astype(np.uint8), (60, 96, 96))
    write_with_libav(path, video, "ffv1", "gray", rate=30)
    read = media.read_media_file(path).video
    assert read is not None
    assert len(read) == 50
    expected = levels[np.floor((np.arange(50) + 0.5) / 25 * 30 + 1e-6).astype(int)]
    np.testing.assert_array_equal(read[:, 0, 0], expected)


def test_read_media_file_resamples_stereo_wav(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100) * 0.5
    soundfile.write(path, np.stack([tone, tone], 1), 44_100)
    read = media.read_media_file(path)
    assert read.video is None
    assert read.audio is not None
    assert read.audio.dtype == np.float32
    assert abs(len(read.audio) - 16_000) <= 32
    spectrum = np.abs(np.fft.rfft(read.audio[:16_000]))
    assert spectrum.argmax() == 440
    assert abs(np.abs(read.audio[1000:-1000]).max() - 0.5) < 0.01


def test_read_media_file_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        media.read_media_file(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="no such file"):
        media.read_media_file(tmp_path)
    text = tmp_path / "a.mp4"
    text.write_text("not a film")
    with pytest.raises(UserError, match="cannot be read as audio or video"):
        media.read_media_file(text)
    subtitles = tmp_path / "a.srt"
    subtitles.write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    with pytest.raises(UserError, match="neither an audio nor a video stream"):
        media.read_media_file(subtitles)


def test_written_streams_say_that_they_are_full_range(tmp_path: Path) -> None:
    with av.open(io.BytesIO(media.encode_video(moving_picture(2)))) as container:
        assert container.streams.video[0].codec_context.color_range == 2  # AVCOL_RANGE_JPEG
