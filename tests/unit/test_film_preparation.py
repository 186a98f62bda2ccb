"""What becomes of films that are turned, late, above full scale or unlike their lists, on their way into a corpus."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mome_dist.data.media import decode_flac, decode_video
from mome_dist.data.preparation.clips import TEST, Clip
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.data.preparation.utterances import LENGTHS, LISTED, UNREADABLE, ClipPreparer, Note, Prepared
from tests.face_films import face_video
from tests.film_files import noise_burst, write_film

FRAMES = 40
CODECS = {"codec": "mpeg4", "pixels": "yuv420p", "sound_codec": "aac"}


@pytest.fixture(scope="module")
def preparer() -> ClipPreparer:
    return ClipPreparer(PreparationSettings("manifests"))


def clip(path: Path, **more: object) -> Clip:
    return Clip("a", TEST, "s", path, **{"text": "hello there", **more})  # type: ignore[arg-type]


def face(frames: int = FRAMES, height: int = 144, width: int = 176) -> np.ndarray:
    return face_video(frames)[:, :height, :width]


def only_rejection(prepared: Prepared) -> tuple[str, str]:
    assert not prepared.utterances
    (rejection,) = prepared.rejections
    return rejection.reason, rejection.detail


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_is_stored_turned_gives_the_same_mouth(
    tmp_path: Path, preparer: ClipPreparer, turns: int, flip: bool
) -> None:
    audio = noise_burst(FRAMES * 640)

    def mouth(name: str, video: np.ndarray, turn: float, flipped: bool) -> np.ndarray:
        def prepare(stream: av.VideoStream) -> None:
            stream.set_display_rotation(turn, hflip=flipped)

        path = write_film(tmp_path / name, video, audio, prepare=prepare, **CODECS)  # type: ignore[arg-type]
        (utterance,) = preparer.prepare(clip(path)).utterances
        assert utterance.mp4 is not None
        return decode_video(utterance.mp4, name)

    upright = mouth("upright.mp4", face(), 0.0, False)
    stored = np.rot90(face()[:, :, ::-1] if flip else face(), turns, axes=(2, 1))
    turned = mouth("turned.mp4", stored, 90.0 * turns, flip)
    # Two codings of one picture; another part of the face differs by 40 and more.
    assert np.abs(turned.astype(int) - upright).mean() < 4


def test_sound_long_before_the_first_picture_is_no_clip(tmp_path: Path, preparer: ClipPreparer) -> None:
    audio = noise_burst((FRAMES + 25) * 640)
    path = write_film(tmp_path / "a.mkv", face(), audio, picture_time=lambda t: t + 1.0)
    reason, detail = only_rejection(preparer.prepare(clip(path)))
    assert reason == LENGTHS and "whose first one comes after 1.00 s (at most 0.4 s)" in detail
    # A part after that is a clip like any other, and in step.
    (utterance,) = preparer.prepare(clip(path, start=1.2, seconds=1.0)).utterances
    assert utterance.frames == 25 and utterance.flac is not None
    np.testing.assert_allclose(decode_flac(utterance.flac, "a"), audio[30 * 640 : 55 * 640], atol=1 / 32_768)


def test_a_short_delay_is_bridged_and_noted(tmp_path: Path, preparer: ClipPreparer) -> None:
    path = write_film(tmp_path / "a.mkv", face(), noise_burst((FRAMES + 5) * 640), picture_time=lambda t: t + 0.2)
    prepared = preparer.prepare(clip(path))
    assert [utterance.frames for utterance in prepared.utterances] == [FRAMES + 5]
    assert prepared.notes == [Note("a", TEST, "its first picture comes after 0.20 s and stands for those before")]


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        ({"listed_frames": FRAMES + 35}, f"{FRAMES} pictures, its list says {FRAMES + 35}"),
        ({"listed_samples": 48_000}, f"{FRAMES * 640} samples, its list says 48000"),
        ({"start": 1.0, "seconds": 2.0}, "15 pictures, its list says 50"),
        ({"listed_frames": FRAMES - 1, "listed_samples": FRAMES * 640 + 900}, None),
    ],
)
def test_counts_of_lists_are_compared(
    tmp_path: Path, preparer: ClipPreparer, listed: dict[str, int], named: str | None
) -> None:
    path = write_film(tmp_path / "a.mkv", face(), noise_burst(FRAMES * 640))
    prepared = preparer.prepare(clip(path, **listed))
    if named is None:
        assert len(prepared.utterances) == 1
    else:
        reason, detail = only_rejection(prepared)
        assert reason == LISTED and named in detail


def test_samples_are_treated_as_everywhere(tmp_path: Path, preparer: ClipPreparer) -> None:
    path, sound = write_film(tmp_path / "a.mkv", face()), tmp_path / "a.wav"
    audio = noise_burst(FRAMES * 640)
    audio /= np.abs(audio).max()
    soundfile.write(sound, 2.5 * audio, 16_000, "FLOAT")
    prepared = preparer.prepare(clip(path, audio=sound))
    (utterance,) = prepared.utterances
    assert utterance.flac is not None
    np.testing.assert_allclose(decode_flac(utterance.flac, "a"), audio, atol=1.01 / 32_768)
    assert [note.note for note in prepared.notes] == ["its sound, up to 2.5 times full scale, was turned down"]
    audio[7] = np.nan
    soundfile.write(sound, audio, 16_000, "FLOAT")
    reason, detail = only_rejection(preparer.prepare(clip(path, audio=sound)))
    assert reason == UNREADABLE and f"a.wav: 1 of {len(audio)} samples are NaN or infinite" in detail


def test_a_film_that_breaks_off_while_it_is_decoded_is_no_clip(tmp_path: Path, preparer: ClipPreparer) -> None:
    """The index says that all is there; the data of the later half is gone."""
    path = write_film(tmp_path / "a.mp4", face(), noise_burst(FRAMES * 640), **CODECS)  # type: ignore[arg-type]
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        places = [(packet.pos, packet.size) for packet in packets if packet.pos is not None]
    data = bytearray(path.read_bytes())
    for place, size in places[FRAMES // 2 :]:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    reason, detail = only_rejection(preparer.prepare(clip(path)))
    assert reason == UNREADABLE and "a.mp4: " in detail
