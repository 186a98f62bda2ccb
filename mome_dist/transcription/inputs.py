"""What may be transcribed: a film's path, sound or mouth crops as arrays, both in a `Clip`, or `Features`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mome_dist.config import RunConfig
from mome_dist.data.films import film_with
from mome_dist.data.films.sound import sound_range
from mome_dist.data.media import FPS, SAMPLE_RATE
from mome_dist.data.preparation.crops import mouth_crops
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import CROP, NoFaceError
from mome_dist.errors import UserError
from mome_dist.speech.geometry import AVHUBERT, expected_geometry

Array = NDArray[Any] | Tensor

_FRAMES_PER_SECOND = {"audio": 2 * FPS, "video": FPS}  # of features
_PER_SECOND = {"audio": SAMPLE_RATE, "video": FPS}  # of clips


@dataclass(frozen=True, eq=False)
class Clip:
    """One utterance before any encoder.

    Attributes:
        audio: sound, float [samples] at 16 kHz, full scale at 1; None without sound.
        video: grey mouth crops, uint8 [T, 96, 96] at 25 a second; None without pictures.
        notes: what was done to it beyond decoding, in words.
    """

    audio: Array | None = None
    video: Array | None = None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Length of each stream that there is."""
        return _lengths(self.audio, self.video, _PER_SECOND)


@dataclass(frozen=True, eq=False)
class Features:
    """What the encoders of a model make of an utterance, to be transcribed at several rates.

    Attributes:
        audio: float [T, d], 50 a second; None without sound.
        video: float [T, d], 25 a second; None without pictures.
        clip_seconds: length of each stream of the clip; of features alone it is known to a frame.
        notes: of the clip.
    """

    audio: Tensor | None = None
    video: Tensor | None = None
    clip_seconds: dict[str, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Length of each stream that there is."""
        return self.clip_seconds or _lengths(self.audio, self.video, _FRAMES_PER_SECOND)


Input = str | Path | Array | Clip | Features


def _lengths(audio: Array | None, video: Array | None, per_second: dict[str, int]) -> dict[str, float]:
    streams = {"audio": audio, "video": video}
    return {stream: len(rows) / per_second[stream] for stream, rows in streams.items() if rows is not None}


def film_clip(path: str | Path, streams: list[str], config: RunConfig) -> Clip:
    """Some streams of a film; of video, the mouth, cropped as the video encoder of a configuration expects it.

    Raises:
        UserError: the file cannot be read, lacks a stream, or its video shows no face for too long.
    """
    film = film_with(path, streams)
    audio, video = film.audio() if "audio" in streams else None, None
    if "video" in streams:
        geometry = expected_geometry(config.video_encoder.path) or AVHUBERT
        (mouth,) = mouth_crops(film, [(0, film.frames)], FaceMesh, geometry=geometry)
        if isinstance(mouth, NoFaceError):
            raise no_face(path, mouth) from mouth
        video = mouth
    return Clip(audio, video, tuple(f"{path}: {note}" for note in film.notes))


def no_face(path: str | Path, why: NoFaceError) -> UserError:
    """What to tell of a film in which no face can be followed."""
    return UserError(f"{path}: {why}: show one face throughout, or leave out --video-rate (video_rate in Python).")


def array_clip(given: Array | Clip, name: str, streams: list[str]) -> Clip:
    """Arrays as the encoders read them: only the streams that are asked for, float32 and uint8.

    Args:
        given: a `Clip`, or an array alone, which is sound if it has one dimension and mouth crops if it has three.
        name: of the input, for messages.

    Raises:
        UserError: an array has another shape or type, holds no numbers, or a stream is missing.
    """
    clip = given if isinstance(given, Clip) else Clip(video=given) if given.ndim == 3 else Clip(audio=given)
    for stream in streams:
        if getattr(clip, stream) is None:
            raise UserError(f"{name} has no {stream}: leave out {stream}_rate, or give Clip(audio=..., video=...).")
    notes = list(clip.notes)
    audio = _sound(_as_numpy(clip.audio), name, notes) if "audio" in streams else None
    video = _mouths(_as_numpy(clip.video), name) if "video" in streams else None
    return Clip(audio, video, tuple(notes))


def checked_features(given: Features, name: str, streams: list[str], widths: dict[str, int]) -> Features:
    """Features that a model can read.

    Args:
        widths: d of each stream.

    Raises:
        UserError: a stream is missing, or is not float [T >= 1, d].
    """
    for stream in streams:
        rows = getattr(given, stream)
        if rows is None:
            raise UserError(f"{name} has no features of {stream}: leave out {stream}_rate, or encode them as well.")
        if rows.ndim != 2 or rows.shape[1] != widths[stream] or not len(rows) or not rows.is_floating_point():
            raise UserError(
                f"{name}: features of {stream} are {rows.dtype} {list(rows.shape)}, and this model reads float "
                f"[T >= 1, {widths[stream]}]: make them with its own encode()."
            )
    return given


def _as_numpy(array: Array | None) -> NDArray[Any]:
    assert array is not None, "streams that are asked for are there"
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def _sound(audio: NDArray[Any], name: str, notes: list[str]) -> NDArray[np.float32]:
    if audio.ndim != 1 or not len(audio) or not np.issubdtype(audio.dtype, np.floating):
        raise UserError(
            f"{name}: audio is {audio.dtype} {list(audio.shape)}; give float [samples >= 1] at 16 kHz, one channel, "
            "full scale at 1 (int16 / 32768), or the path of a recording."
        )
    sound = np.ascontiguousarray(audio, np.float32)
    if (loudest := sound_range(sound, name)) > 1.0:  # as a film's
        sound = sound / np.float32(loudest)
        notes.append(f"{name}: its sound, up to {loudest:.3g} times full scale, was turned down")
    return sound


def _mouths(video: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if video.ndim != 3 or video.dtype != np.uint8 or video.shape[1:] != (CROP, CROP) or not len(video):
        raise UserError(
            f"{name}: video is {video.dtype} {list(video.shape)}; give grey mouth crops, uint8 [T >= 1, {CROP}, "
            f"{CROP}] at {FPS} a second, or the path of a film, whose mouth is found."
        )
    return np.ascontiguousarray(video)


def as_tensor(array: Array) -> Tensor:
    """The same numbers for torch."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
