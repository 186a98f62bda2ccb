"""Synthetic speakers: a voice setting and a face, drawn from a seed.

No two splits share a speaker: every split draws its own from its own seeds, over the same few synthesiser voices.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Voice:
    """How a speaker sounds, relative to one of the synthesiser's voices.

    ``pitch`` scales the fundamental frequency, ``stretch`` the duration of phones; ``warp`` then resamples the sound,
    which moves the formants as another vocal tract length would (and pitch and tempo with them).
    """

    name: str
    pitch: float
    stretch: float
    warp: float


@dataclass(frozen=True)
class Face:
    """How a speaker's mouth region looks. Lengths in pixels of the 96x96 crop, grey levels 0-255, angles in degrees."""

    skin: float
    lip_shade: float
    teeth: float
    cavity: float
    background: float
    half_width: float
    upper_lip: float
    lower_lip: float
    cupids_bow: float
    nose_width: float
    jaw_half_width: float
    chin: float
    jaw_range: float
    lip_range: float
    asymmetry: float
    stubble: float
    light: float
    tilt: float
    shift_x: float
    shift_y: float
    grain: float
    texture_seed: int


@dataclass(frozen=True)
class Speaker:
    """A named voice and face."""

    id: str
    voice: Voice
    face: Face


def _draw_face(rng: np.random.Generator) -> Face:
    uniform = rng.uniform
    skin = uniform(105, 205)
    return Face(
        skin=skin,
        lip_shade=uniform(0.55, 0.78),
        teeth=uniform(205, 245),
        cavity=uniform(12, 34),
        background=uniform(15, 140),
        half_width=uniform(20.5, 25.5),
        upper_lip=uniform(4.2, 6.2),
        lower_lip=uniform(5.6, 8.4),
        cupids_bow=uniform(0.9, 2.2),
        nose_width=uniform(10, 15),
        jaw_half_width=uniform(39, 50),
        chin=uniform(31, 38),
        jaw_range=uniform(0.85, 1.2),
        lip_range=uniform(0.85, 1.15),
        asymmetry=uniform(-1, 1),
        stubble=float(uniform(0, 1) ** 3 * 0.8),
        light=uniform(-0.4, 0.4),
        tilt=uniform(-6, 6),
        shift_x=uniform(-3, 3),
        shift_y=uniform(-3, 2),
        grain=uniform(1.0, 3.5),
        texture_seed=int(rng.integers(1 << 31)),
    )


def draw_speaker(split: str, index: int, voices: tuple[str, ...], seed: int) -> Speaker:
    """The ``index``-th speaker of a split: voices take turns, everything else is drawn."""
    rng = np.random.default_rng([seed, zlib.crc32(f"speaker {split} {index}".encode())])
    name = voices[index % len(voices)]
    voice = Voice(name, pitch=rng.uniform(0.85, 1.2), stretch=rng.uniform(0.9, 1.1), warp=rng.uniform(0.9, 1.12))
    return Speaker(f"{split}-{index:02d}-{name}", voice, _draw_face(rng))
