"""Which points of a face decide how its picture is turned and scaled, and how: by least squares, to a mean face."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Numbers of the mesh's points that stand for those of the 68-point scheme that the field aligns with. What hardly moves
# in speech: the base of the nose (33 there) and the corners of the eyes (36, 39, 42, 45), the viewer's left eye first.
STABLE = (2, 33, 133, 362, 263)
# Both contours of the lips (48 to 67 there): what is averaged must be the same points, or the crop's centre is another.
OUTER_LIPS = (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181)
INNER_LIPS = (78, 82, 13, 312, 308, 317, 14, 87)
LIPS = (*OUTER_LIPS, *INNER_LIPS)
POINTS = (*STABLE, *LIPS)

# `STABLE` on the mean face of 68 points that the field aligns with ("20 words"), in a frame of 256x256.
MEAN_FACE_PX = np.array([[128.9, 137.3], [92.5, 94.4], [112.8, 94.9], [145.5, 94.5], [166.7, 93.6]])
FRAME = 256
WINDOW = 12  # frames, from a frame on, whose stable points decide its rotation and scale

_STABLE = slice(0, len(STABLE))
_LIPS = slice(len(STABLE), len(STABLE) + len(LIPS))

Points = NDArray[np.float32]
"""[frames, points, 2]: x and y in pixels. NaN where no face was found, infinite where what was found is none."""

Linear = NDArray[np.float32]
"""Rotation and scale from the picture to the mean face: [2, 2], or [frames, 2, 2]."""


def averaged(points: Points, frames: int = WINDOW) -> Points:
    """Points of every frame averaged over ``frames`` frames from it on; at the end over the last ``frames`` ones.

    On a stream, frame ``i`` of this is ``points[i : i + frames].mean(0)`` until the end is seen.
    """
    frames = min(frames, len(points))
    mean_FPX = sliding_window_view(points, frames, axis=0).mean(axis=-1, dtype=np.float64)
    return np.concatenate([mean_FPX, np.repeat(mean_FPX[-1:], frames - 1, axis=0)]).astype(np.float32)


def align(points: Points) -> Linear:
    """Rotation and scale of every frame's similarity, which brings `STABLE` closest (least squares) to the mean face.

    In closed form: Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.

    Args:
        points: averaged over time, [frames, points, 2].

    Returns:
        float32 [frames, 2, 2]: ``linear @ x`` turns and scales the picture's x.
    """
    source_FPX = points[:, _STABLE].astype(np.float64)
    source_FPX = source_FPX - source_FPX.mean(axis=1, keepdims=True)
    target_PX = MEAN_FACE_PX - MEAN_FACE_PX.mean(axis=0)
    spread_F = np.maximum(np.square(source_FPX).sum((1, 2)), 1e-9)
    dot_F = (source_FPX * target_PX).sum((1, 2)) / spread_F
    cross_F = (source_FPX[..., 0] * target_PX[:, 1] - source_FPX[..., 1] * target_PX[:, 0]).sum(1) / spread_F
    linear_FXY = np.stack([np.stack([dot_F, -cross_F], 1), np.stack([cross_F, dot_F], 1)], 1)
    return linear_FXY.astype(np.float32)


def centers(points: Points) -> Points:
    """The centre of every frame's mouth in the picture: float32 [frames, 2] of points that are not averaged."""
    center_FX: Points = points[:, _LIPS].mean(axis=1)
    return center_FX


def to_mean_face(points_PX: Points) -> NDArray[np.float64]:
    """The whole similarity of one frame, [2, 3]: what brings its picture into the frame of 256x256."""
    linear_XY = align(points_PX[None])[0]
    shift_X = MEAN_FACE_PX.mean(axis=0) - linear_XY @ points_PX[_STABLE].mean(axis=0)
    return np.concatenate([linear_XY, shift_X[:, None]], axis=1)
