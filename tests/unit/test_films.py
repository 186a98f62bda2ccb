"""Films and recordings of a user's own: read by their own clock and metadata, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import soundfile

from mome_dist.data.films import Film, resample_audio
from mome_dist.data.media import Video, encode_video, write_media_file
from mome_dist.errors import UserError
from tests.film_files import BLOCK, delay_of, moving_picture, noise_burst, write_film

LATE = BLOCK * 8 / 16_000  # seconds


def numbered(frames: int, height: int = 96, width: int = 96) -> Video:
    """Pictures that carry their number as their grey level."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None], (frames, height, width))


# --- one clock -----------------------------------------------------------------------------------------------------


def test_both_streams_are_in_step(tmp_path: Path) -> None:
    video, audio = moving_picture(50), noise_burst(32_000)
    write_media_file(tmp_path / "both.mp4", audio, video)
    film = Film(tmp_path / "both.mp4")
    pictures, sound = film.video(), film.audio()
    assert pictures.shape == video.shape
    assert np.abs(pictures.astype(int) - video).mean() < 3
    assert 0 <= len(sound) - 32_000 < 2048  # AAC fills its last block
    assert abs(delay_of(audio[6000:16_000], sound[4000:20_000]) - 2000) <= 16  # 1 ms


def test_sound_that_starts_late_is_late(tmp_path: Path) -> None:
    audio = noise_burst(16_000)
    film = Film(write_film(tmp_path / "a.mkv", moving_picture(50), audio, sound_time=lambda t: t + LATE))
    sound = film.audio()
    assert abs(delay_of(audio[2000:10_000], sound) - 2000 - LATE * 16_000) <= 16
    assert not sound[: round(LATE * 16_000) - 16].any()
    assert len(Film(film.path, ["audio"]).audio()) == 16_000  # its own start, where it is read alone


def test_sound_before_the_first_picture_is_kept(tmp_path: Path) -> None:
    audio = noise_burst(48_000)
    film = Film(write_film(tmp_path / "a.mkv", numbered(50), audio, picture_time=lambda t: t + 1.0))
    pictures, sound = film.video(), film.audio()
    np.testing.assert_allclose(sound, audio, atol=1e-6)
    assert film.picture_delay == pytest.approx(1.0) and film.frames == 75
    assert film.notes == ["its first picture comes after 1.00 s and stands for those before"]
    assert pictures[:, 0, 0].tolist() == [0] * 25 + list(range(50))  # the first one stands in for what is missing
    alone = Film(film.path, ["video"])
    assert alone.picture_delay == 0 and alone.video()[:, 0, 0].tolist() == list(range(50))
    np.testing.assert_allclose(Film(film.path, ["audio"]).audio(), audio, atol=1e-6)


def test_a_hole_in_the_sound_stays_a_hole(tmp_path: Path) -> None:
    audio = noise_burst(BLOCK * 40)
    film = Film(
        write_film(tmp_path / "a.mkv", None, audio, sound_time=lambda t: t + (LATE if t >= BLOCK * 10 / 16_000 else 0))
    )
    sound = film.audio()
    hole = slice(BLOCK * 10, BLOCK * 18)
    assert len(sound) == BLOCK * 48
    np.testing.assert_allclose(sound[: hole.start], audio[: hole.start], atol=1e-6)
    assert not sound[hole].any()
    np.testing.assert_allclose(sound[hole.stop :], audio[hole.start :], atol=1e-6)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.nut"])
@pytest.mark.parametrize("jitter", ["rounding", "noise", "one bad stamp"])
def test_jitter_of_time_stamps_is_no_hole(tmp_path: Path, jitter: str, name: str) -> None:
    rng, audio = np.random.default_rng(0), noise_burst(BLOCK * 40)
    moved: dict[str, Callable[[float], float]] = {
        "rounding": lambda t: round(t * 50) / 50,
        "noise": lambda t: t + (rng.uniform(-0.03, 0.03) if t > 0.1 else 0.0),
        "one bad stamp": lambda t: t + (0.05 if round(t * 16_000) == BLOCK * 20 else 0.0),
    }
    codec = "aac" if name.endswith("mp4") else "pcm_f32le"
    plain = Film(write_film(tmp_path / f"plain-{name}", None, audio, sound_codec=codec)).audio()
    film = Film(write_film(tmp_path / name, None, audio, sound_codec=codec, sound_time=moved[jitter]))
    np.testing.assert_array_equal(film.audio()[: len(audio)], plain[: len(audio)])


def test_a_clock_that_runs_away_is_followed(tmp_path: Path) -> None:
    """A sound card that is 2 % slow: after 10 s its samples are 0.2 s late, which the time stamps tell."""
    audio = noise_burst(160_000)
    sound = Film(write_film(tmp_path / "a.mkv", None, audio, sound_time=lambda t: t * 1.02)).audio()
    late = delay_of(audio[150_000:158_000], sound) - round(150_000 * 1.02)
    assert abs(late) <= 0.041 * 16_000  # less than a picture


def test_time_stamps_of_no_recording_are_refused(tmp_path: Path) -> None:
    audio = noise_burst(48_000)
    path = write_film(tmp_path / "a.mkv", None, audio, sound_time=lambda t: t + (3600.0 if t > 1 else 0))
    with pytest.raises(UserError, match=r"a\.mkv: the time stamps of its sound jump by \+3600\.00 s at 1\.02 s"):
        Film(path).audio()
    # Two recordings in one file, each with a clock of its own.
    twice = tmp_path / "b.ts"
    twice.write_bytes(write_film(tmp_path / "a.ts", None, audio, sound_codec="aac").read_bytes() * 2)
    with pytest.raises(UserError, match=r"b\.ts: the time stamps of its sound jump by -3\.\d\d s at 3\.\d\d s"):
        Film(twice).audio()


def test_pictures_hours_apart_are_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mkv", numbered(10), picture_time=lambda t: t + (3600 if t > 0.2 else 0))
    with pytest.raises(UserError, match=r"its pictures jump by \+3600\.04 s at 0\.20 s"):
        Film(path).video()


def test_other_frame_rates_become_25(tmp_path: Path) -> None:
    """At 25 fps the pictures must follow the same time."""
    levels = np.arange(0, 240, 4)  # 60 pictures at 30 fps: two seconds
    video = np.broadcast_to(levels[:, None, None].astype(np.uint8), (60, 96, 96))
    read = Film(write_film(tmp_path / "a.mkv", video, rate=30)).video()
    assert len(read) == 50
    expected = levels[np.floor((np.arange(50) + 0.5) / 25 * 30 + 1e-6).astype(int)]
    np.testing.assert_array_equal(read[:, 0, 0], expected)


# --- a part --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_f32le"), ("a.mp4", "aac"), ("a.avi", "pcm_f32le")])
def test_a_part_is_what_the_whole_has_there(tmp_path: Path, name: str, codec: str) -> None:
    audio = noise_burst(16_000 * 8)
    path = write_film(tmp_path / name, moving_picture(200), audio, codec="mpeg4", pixels="yuv420p", sound_codec=codec)
    whole = Film(path)
    pictures, sound = whole.video(), whole.audio()
    for start, seconds in ((0.0, 1.0), (0.52, 2.0), (5.2, 1.6), (7.0, 3.0)):
        part = Film(path, start=start, seconds=seconds)
        first, last = round(start * 25), round((start + seconds) * 25)
        np.testing.assert_array_equal(part.video(), pictures[first:last])
        expected = sound[first * 640 : last * 640]
        np.testing.assert_allclose(part.audio()[: len(expected)], expected, atol=1e-6)
    beyond = Film(path, start=9.0, seconds=1.0)
    assert beyond.frames == 0 and not len(beyond.audio()) and not list(beyond.pictures())


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_pictures_are_upright(tmp_path: Path, turns: int, flip: bool) -> None:
    """A scene is stored turned and mirrored, and its display matrix says how to undo that."""
    scene = np.zeros((3, 64, 96), np.uint8)
    scene[:, 4:12, 4:20], scene[:, 50:60, 80:84] = 250, 120
    stored = np.rot90(scene[:, :, ::-1] if flip else scene, turns, axes=(2, 1))  # clockwise

    def prepare(stream: av.VideoStream) -> None:
        stream.set_display_rotation(90.0 * turns, hflip=flip)

    path = write_film(tmp_path / "a.mp4", stored, codec="mpeg4", pixels="yuv420p", prepare=prepare)
    read = Film(path).video()
    assert read.shape == scene.shape
    assert np.abs(read.astype(int) - scene).mean() < 3


def test_a_turn_by_any_angle_is_refused(tmp_path: Path) -> None:
    path = write_film(
        tmp_path / "a.mp4",
        moving_picture(2),
        codec="mpeg4",
        pixels="yuv420p",
        prepare=lambda stream: stream.set_display_rotation(30.0),
    )
    with pytest.raises(UserError, match=r"a\.mp4: its display matrix turns pictures by other than a quarter turn"):
        Film(path).video()


def test_pixels_become_square(tmp_path: Path) -> None:
    """PAL's wide pixels: a circle of the scene is stored as a narrow ellipse."""
    picture = np.zeros((2, 96, 96), np.uint8)
    for image in picture:
        cv2.ellipse(image, (48, 48), (24, 36), 0, 0, 360, 255, -1)

    def prepare(stream: av.VideoStream) -> None:
        stream.codec_context.options = {"x264-params": "sar=3/2"}

    read = Film(write_film(tmp_path / "a.mp4", picture, codec="libx264", pixels="yuv420p", prepare=prepare)).video()
    assert read.shape == (2, 96, 144)
    rows, columns = np.nonzero(read[0] > 127)
    assert abs(int(np.ptp(rows)) - int(np.ptp(columns))) <= 1


@pytest.mark.parametrize(
    ("codec", "pixels"), [("libx264", "yuv420p"), ("ffv1", "gray"), ("ffv1", "bgr0"), ("mjpeg", "yuvj420p")]
)
def test_every_grey_range_is_known(tmp_path: Path, codec: str, pixels: str) -> None:
    """A picture that libav wrote in limited range, grey, RGB or full range comes back as it went in."""
    video = moving_picture(6)
    film = Film(write_film(tmp_path / "a.mkv", video, codec=codec, pixels=pixels))
    assert not film.has_audio
    slope, offset = np.polyfit(video.ravel().astype(float), film.video().ravel().astype(float), 1)
    assert abs(slope - 1) < 0.01
    assert abs(offset) < 1.5


def test_a_cover_picture_is_no_film(tmp_path: Path) -> None:
    path = write_film(
        tmp_path / "a.mp4",
        numbered(1),
        noise_burst(16_000),
        codec="mjpeg",
        pixels="yuvj420p",
        sound_codec="aac",
        prepare=lambda stream: setattr(stream, "disposition", av.stream.Disposition.attached_pic),
    )
    film = Film(path)
    assert film.has_audio and not film.has_video and film.frames == 0


# --- sound ---------------------------------------------------------------------------------------------------------


def test_stereo_of_another_rate_becomes_mono_at_16_khz(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1), 44_100)
    film = Film(tmp_path / "a.wav")
    sound = film.audio()
    assert not film.has_video and sound.dtype == np.float32
    assert abs(len(sound) - 16_000) <= 32
    assert np.abs(np.fft.rfft(sound[:16_000])).argmax() == 440
    assert abs(np.abs(sound[1000:-1000]).max() - 0.5) < 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    audio = noise_burst(16_000)
    audio[[5, 700]] = bad
    soundfile.write(tmp_path / "a.wav", audio, 16_000, "FLOAT")
    with pytest.raises(UserError, match=r"a\.wav: 2 of 16000 samples are NaN or infinite"):
        Film(tmp_path / "a.wav").audio()
    with pytest.raises(UserError, match="noise: 2 of 16000 samples are NaN or infinite"):
        resample_audio(audio, 8000, "noise")


@pytest.mark.parametrize("scale", [1.7, 32_768.0])
def test_sound_above_full_scale_is_turned_down_and_noted(tmp_path: Path, scale: float) -> None:
    audio = noise_burst(16_000)
    audio /= np.abs(audio).max()
    soundfile.write(tmp_path / "a.wav", audio * np.float32(scale), 16_000, "FLOAT")
    film = Film(tmp_path / "a.wav")
    np.testing.assert_allclose(film.audio(), audio, atol=1e-6)
    assert film.notes == [f"its sound, up to {scale:.3g} times full scale, was turned down"]


def test_channels_that_cancel_each_other_are_refused(tmp_path: Path) -> None:
    audio = noise_burst(16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([audio, -audio], 1), 16_000)
    with pytest.raises(UserError, match="its channels cancel each other"):
        Film(tmp_path / "a.wav").audio()
    soundfile.write(tmp_path / "b.wav", np.stack([audio, 0 * audio], 1), 16_000)
    assert Film(tmp_path / "b.wav").audio().any()  # one silent channel is common
    soundfile.write(tmp_path / "c.wav", np.zeros((100, 2)), 16_000)
    assert len(Film(tmp_path / "c.wav").audio()) == 100  # and so is silence


# --- only what is asked for ----------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from mome_dist.data.films import Film
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
film = Film(sys.argv[1], [sys.argv[2]])
print(len(film.audio()), sum(1 for _ in film.pictures()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("stream", "expected"), [("audio", [480_000, 0]), ("video", [0, 752])])
def test_memory_does_not_grow_with_the_film(tmp_path: Path, stream: str, expected: list[int]) -> None:
    """Eighty pictures in 1080p take 166 MB, the half minute that they are shown for 1.6 GB."""
    grey = np.random.default_rng(0).integers(0, 255, (80, 1, 1), np.uint8)
    path = write_film(
        tmp_path / "a.mkv",
        np.broadcast_to(grey, (80, 1080, 1920)),
        noise_burst(480_000),
        codec="mpeg4",
        pixels="yuv420p",
        picture_time=lambda t: t * 9.5,
    )
    done = subprocess.run([sys.executable, "-c", MEASURE, path, stream], capture_output=True, text=True, check=True)
    *found, kilobytes = map(int, done.stdout.split())
    assert found == expected
    assert kilobytes < (20_000 if stream == "audio" else 80_000)


def test_what_is_no_film_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.mp4 does not exist"):
        Film(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="is a folder, not a file"):
        Film(tmp_path)
    (tmp_path / "a.mp4").write_text("not a film")
    with pytest.raises(UserError, match="cannot be read as audio or video"):
        Film(tmp_path / "a.mp4")
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    with pytest.raises(UserError, match="neither an audio nor a video stream"):
        Film(tmp_path / "a.srt")
    (tmp_path / "b.mp4").write_bytes(encode_video(moving_picture(3)))
    assert not Film(tmp_path / "b.mp4", ["audio"]).has_audio


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_film_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    path = write_film(
        tmp_path / name, moving_picture(200), noise_burst(128_000), codec="mpeg4", pixels="yuv420p", sound_codec="aac"
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}: .*(cut off|cannot be read)"):
        Film(path)
