"""Drawing a speaking mouth: articulator tracks and a `Face` to 96x96 grey video.

Everything is drawn upright at twice the size: a face plate made once a speaker (skin, light, nose, folds, chin,
stubble), its lower part moved with the jaw, and the mouth as a few anti-aliased polygons between four curves (outer
and inner contours of both lips). One affine warp then moves the head and halves the size; camera noise comes last.

Coordinates below are pixels of the 96x96 crop relative to the centre of the mouth, x to the right and y down.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import FPS, Video
from mome_dist.data.synthetic.speakers import Face

SIZE = 96
_SCALE = 2  # drawing scale
_ZOOM = 1.15  # of the crop over the proportions in `Face`
_MARGIN = 6  # crop pixels around the picture, for head motion
_CANVAS = (SIZE + 2 * _MARGIN) * _SCALE
_CENTRE = (SIZE / 2 + _MARGIN) * _SCALE  # centre of the mouth on the canvas
_MOUTH_Y = 46.0  # where the crop has it at rest
_SUBPIXEL_BITS = 4
_JAW_OPENING = 17.0  # pixels between the lips at jaw = 1
_JAW_DROP = 9.0  # pixels that the chin sinks at jaw = 1

_U = np.linspace(0.0, 1.0, 29)  # along the lips from corner to corner
_ARCH = np.sin(np.pi * _U)
_SIDE = 2 * _U - 1
_BOW = np.exp(-((_SIDE / 0.13) ** 2))

Curve = NDArray[np.float64]
Grid = NDArray[np.floating]


def _gaussian(x: Grid, centre: float, width: float) -> Grid:
    return np.exp(-(((x - centre) / width) ** 2))


@lru_cache(maxsize=64)
def _plate(face: Face) -> Video:
    """The face without a mouth, jaw closed: uint8 [canvas, canvas]."""
    rng = np.random.default_rng(face.texture_seed)
    axis = (np.arange(_CANVAS, dtype=np.float32) + 0.5 - _CENTRE) / _SCALE
    x, y = axis[None, :], axis[:, None]
    texture = cv2.GaussianBlur(rng.standard_normal((_CANVAS, _CANVAS), np.float32), (0, 0), 1.6) * 7
    skin = face.skin + texture + x / 48 * face.light * 45 - np.abs(x) / 48 * 15
    skin = skin - 24 * _gaussian(x, 0, face.nose_width) * _gaussian(y, -22, 3.5)  # under the nose
    for side in (-1, 1):
        nostril = _gaussian(x, side * face.nose_width * 0.45, 3.0) * _gaussian(y, -25, 2.0)
        fold = _gaussian(x, side * (face.half_width + 7 + 0.2 * 8), 3.5) * _gaussian(y, -4, 13)
        skin = skin - 0.55 * face.skin * nostril - 13 * fold
    skin = skin - 9 * _gaussian(x, 0, 2.2) * _gaussian(y, -13, 5)  # philtrum
    skin = skin - 24 * _gaussian(x, 0, 14) * _gaussian(y, 17, 3)  # between lower lip and chin
    if face.stubble > 0.05:
        hair = cv2.GaussianBlur(rng.standard_normal((_CANVAS, _CANVAS), np.float32), (0, 0), 0.9) * 16
        zone = np.clip(1 - np.abs((y - 6) / 30) ** 3, 0, 1)
        skin = skin - zone * face.stubble * (20 + hair)
    # The jaw's outline is an ellipse around a point above the mouth; below the chin lies the shaded neck.
    radius = np.hypot(x / face.jaw_half_width, (y + 12) / (face.chin + 12))
    inside = np.clip((1 - radius) * 20, 0, 1)
    skin = skin - 30 * np.clip((radius - 0.8) / 0.2, 0, 1) ** 2
    neck = np.where(np.abs(x) < face.jaw_half_width * 0.75, face.skin * 0.5, face.background)
    return np.clip(inside * skin + (1 - inside) * neck, 0, 255).astype(np.uint8)


def _to_fixed_point(x: Curve, upper: Curve, lower: Curve) -> NDArray[np.int32]:
    """Closed outline between two curves over the same x, in cv2's fixed point on the canvas."""
    points = np.empty((2 * len(x), 2))
    points[: len(x), 0], points[len(x) :, 0] = x, x[::-1]
    points[: len(x), 1], points[len(x) :, 1] = upper, lower[::-1]
    return np.rint((points * _SCALE + (_CENTRE - 0.5)) * (1 << _SUBPIXEL_BITS)).astype(np.int32)


def _fill(canvas: Video, x: Curve, upper: Curve, lower: Curve, grey: float) -> None:
    cv2.fillPoly(canvas, [_to_fixed_point(x, upper, lower)], float(grey), cv2.LINE_AA, _SUBPIXEL_BITS)


def _line(canvas: Video, x: Curve, y: Curve, grey: float, thickness: int) -> None:
    points = np.rint((np.stack([x, y], 1) * _SCALE + (_CENTRE - 0.5)) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    cv2.polylines(canvas, [points], False, float(grey), thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _draw_mouth(canvas: Video, face: Face, articulation: NDArray[np.float32]) -> None:
    """Draw lips, and between them cavity, tongue and teeth, for one frame's seven articulators."""
    jaw, spread, rounding, teeth, tongue, seal, tuck = (float(value) for value in articulation)
    width = face.half_width * (1 + 0.22 * spread - 0.27 * rounding)
    opening = max(0.0, jaw * (1 - 0.95 * seal)) * _JAW_OPENING
    wide = max(spread, 0.0)
    upper_height = face.upper_lip * (1 + 0.40 * rounding - 0.40 * seal - 0.12 * wide - 0.15 * tuck)
    lower_height = face.lower_lip * (1 + 0.35 * rounding - 0.45 * seal - 0.12 * wide - 0.60 * tuck)
    x = _SIDE * width
    tilt = 0.4 * face.asymmetry * _SIDE
    upper_inner = tilt - 0.35 * opening * _ARCH**0.8
    lower_inner = tilt + 0.65 * opening * _ARCH**0.8 + 0.25 * _JAW_DROP * jaw * _ARCH
    if opening < 0.5:
        lower_inner = np.maximum(upper_inner, tilt)  # closed lips touch, wherever the jaw is
    upper_outer = upper_inner - upper_height * _ARCH**0.6 * (1 - 0.12 * face.cupids_bow * _BOW)
    lower_outer = lower_inner + lower_height * _ARCH**0.7
    lip = face.skin * face.lip_shade
    gloss = 14 + 16 * rounding

    _fill(canvas, x, lower_inner, lower_outer, lip)
    _fill(canvas, x, upper_outer, upper_inner, lip * 0.84)
    middle = slice(6, -6)
    _line(canvas, x[middle], lower_inner[middle] + 0.5 * lower_height, lip + gloss, max(1, round(0.55 * lower_height)))
    _line(canvas, x, upper_outer, lip * 0.98, 1)

    if opening < 0.5:
        _line(canvas, x, (upper_inner + lower_inner) / 2, lip * 0.42, 2)
        return
    _fill(canvas, x, upper_inner, lower_inner, face.cavity)
    if tongue > 0.05:
        span = 0.62 * width
        height = (1.5 + 5.5 * tongue) * np.sqrt(np.clip(1 - (x / span) ** 2, 0, 1))
        top = np.maximum(lower_inner - height, upper_inner + 0.12 * opening)
        _fill(canvas, x, np.minimum(top, lower_inner), lower_inner, 0.8 * face.skin)
    if teeth > 0.05:
        edge = np.minimum(upper_inner + (4.4 * teeth * (1 - 0.3 * rounding)) * _ARCH**0.5, lower_inner)
        _fill(canvas, x, upper_inner, edge, face.teeth * (0.55 + 0.45 * min(1.0, teeth)))
    if teeth > 0.55 and tuck < 0.5:
        rim = np.maximum(lower_inner - 2.4 * (teeth - 0.4) * _ARCH**0.5, edge)
        _fill(canvas, x, rim, lower_inner, 0.8 * face.teeth)
    _line(canvas, x, upper_inner, lip * 0.5, 1)


def _drift(rng: np.random.Generator, frames: int, amount: float) -> NDArray[np.float64]:
    """A smooth wander of standard deviation ``amount``: three slow sine waves. float64 [frames]."""
    frequency, phase = rng.uniform(0.1, 0.9, (3, 1)), rng.uniform(0, 2 * np.pi, (3, 1))
    times = np.arange(frames) / FPS
    wave: NDArray[np.float64] = np.sin(2 * np.pi * frequency * times + phase).sum(0)
    return amount * wave / np.sqrt(1.5)


def _head_motion(face: Face, rng: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """Affine matrices [frames, 2, 3] from canvas to crop coordinates."""
    angle = np.deg2rad(face.tilt + _drift(rng, frames, 1.2))
    scale = _ZOOM * (1 + _drift(rng, frames, 0.02)) / _SCALE
    centre_x = SIZE / 2 - 0.5 + face.shift_x + _drift(rng, frames, 0.8)
    centre_y = _MOUTH_Y - 0.5 + face.shift_y + _drift(rng, frames, 0.8)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    origin = _CENTRE - 0.5
    rows = [[cos, sin, centre_x - (cos + sin) * origin], [-sin, cos, centre_y - (cos - sin) * origin]]
    return np.moveaxis(np.array(rows), -1, 0)


def render(track: NDArray[np.float32], face: Face, rng: np.random.Generator) -> Video:
    """Draw an articulator track, float32 [frames, 7] (`visemes.blend`), as uint8 [frames, 96, 96].

    ``rng`` drives what differs between clips of one speaker: head motion, exposure and camera noise.
    """
    frames = len(track)
    plate = _plate(face)
    motion = _head_motion(face, rng, frames)
    track = track * np.array([face.jaw_range, face.lip_range, face.lip_range, 1, 1, 1, 1], np.float32)
    # Only the rows below the mouth's centre move with the jaw, each by its own share of the drop.
    middle = int(_CENTRE)
    rows = np.arange(_CANVAS - middle, dtype=np.float32)
    columns = np.tile(np.arange(_CANVAS, dtype=np.float32), (len(rows), 1))
    depth = np.clip(rows / (_SCALE * face.chin), 0, 1)
    drop = 0.9 * _JAW_DROP * _SCALE * depth * depth * (3 - 2 * depth)
    source = np.empty_like(columns)
    video = np.empty((frames, SIZE, SIZE), np.uint8)
    for index, articulation in enumerate(track):
        source[:] = (middle + rows - max(0.0, float(articulation[0])) * drop)[:, None]
        canvas = plate.copy()
        cv2.remap(plate, columns, source, cv2.INTER_LINEAR, canvas[middle:], cv2.BORDER_REPLICATE)
        _draw_mouth(canvas, face, articulation)
        video[index] = cv2.warpAffine(canvas, motion[index], (SIZE, SIZE), borderMode=cv2.BORDER_REPLICATE)
    exposure = np.float32(rng.uniform(0.92, 1.08))
    noise = rng.standard_normal(video.shape, np.float32)
    noise *= np.float32(face.grain)
    noise += video * exposure
    return np.clip(np.rint(noise, out=noise), 0, 255, out=noise).astype(np.uint8)
