"""From points of a face to a steady 96x96 crop of its mouth.

As in the recipes around AV-HuBERT (Shi et al., 2022) and auto_avsr (Ma et al., 2023): points are smoothed over time, a
similarity (rotation, one scale, shift) brings the face of every frame to a mean face in a frame of 256x256, and the
crop is centred on the mouth there. Rotation and scale come from points that speech hardly moves, so that an open mouth
does not shrink the face; they are smoothed, while the place of the face is not, so that the crop follows a nod.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import FPS, Video
from mome_dist.data.preparation.landmarks import LIPS, STABLE, Points
from mome_dist.errors import UserError

CROP = 96
LONGEST_GAP = FPS  # frames in a row that may lack a face: a second
# `landmarks.STABLE` on a face of average proportions, looking ahead, in a frame of 256x256: eyes 72 apart.
MEAN_FACE_PX = np.array([[77, 108], [107, 108], [149, 108], [179, 108], [128, 162]], np.float32)

_SMOOTHED_OVER = 6  # frames on either side
_SHRINK_BELOW = 0.5  # a face larger than this would alias under bilinear sampling

_STABLE = slice(0, len(STABLE))
_LIPS = slice(len(STABLE), len(STABLE) + len(LIPS))


class NoFaceError(UserError):
    """A clip shows no face for too long."""


@dataclass(frozen=True)
class Similarity:
    """Per frame, what brings the image to the mean face: ``x -> linear @ x + shift``.

    Attributes:
        linear_FXY: rotation and scale, float32 [frames, 2, 2].
        shift_FX: float32 [frames, 2].
    """

    linear_FXY: NDArray[np.float32]
    shift_FX: NDArray[np.float32]


def fill_gaps(points: Points, longest: int = LONGEST_GAP) -> Points:
    """Points of frames without a face, on a straight line between the frames around them (or as in the nearest one).

    Raises:
        NoFaceError: no frame has a face, or more than ``longest`` in a row have none; the message has the counts.
    """
    found = ~np.isnan(points[:, 0, 0])
    if found.all():
        return points
    marks = np.flatnonzero(np.concatenate(([True], found, [True])))
    gap = int(np.diff(marks).max()) - 1
    if gap > longest or not found.any():
        missing = len(found) - int(found.sum())
        raise NoFaceError(
            f"no face in {missing} of {len(found)} frames, {gap} of them in a row (at most {longest} are bridged)"
        )
    frames, known = np.arange(len(found)), np.flatnonzero(found)
    flat = points.reshape(len(points), -1)
    filled = np.stack([np.interp(frames, known, column[found]) for column in flat.T], axis=1)
    return filled.reshape(points.shape).astype(np.float32)


def smooth(points: Points) -> Points:
    """Shapes averaged over time, each at its own frame's place. At the ends the window shrinks on both sides."""
    place_FX = points.mean(axis=1, keepdims=True)
    shape_FPX = (points - place_FX).astype(np.float64)
    sums = np.concatenate([np.zeros_like(shape_FPX[:1]), np.cumsum(shape_FPX, axis=0)])
    frames = np.arange(len(points))
    half = np.minimum(_SMOOTHED_OVER, np.minimum(frames, frames[::-1]))
    mean_FPX = (sums[frames + half + 1] - sums[frames - half]) / (2 * half + 1)[:, None, None]
    return (mean_FPX + place_FX).astype(np.float32)


def align(points: Points) -> Similarity:
    """The similarity of every frame that brings `STABLE` closest (least squares) to the mean face.

    In closed form: Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.
    """
    source_FPX = points[:, _STABLE].astype(np.float64)
    center_FX, target_X = source_FPX.mean(axis=1), MEAN_FACE_PX.mean(axis=0)
    source_FPX = source_FPX - center_FX[:, None]
    target_PX = MEAN_FACE_PX - target_X
    spread_F = np.maximum(np.square(source_FPX).sum((1, 2)), 1e-9)
    dot_F = (source_FPX * target_PX).sum((1, 2)) / spread_F
    cross_F = (source_FPX[..., 0] * target_PX[:, 1] - source_FPX[..., 1] * target_PX[:, 0]).sum(1) / spread_F
    linear_FXY = np.stack([np.stack([dot_F, -cross_F], 1), np.stack([cross_F, dot_F], 1)], 1)
    shift_FX = target_X - np.einsum("fxy,fy->fx", linear_FXY, center_FX)
    return Similarity(linear_FXY.astype(np.float32), shift_FX.astype(np.float32))


def crop_mouth(video: Video, points: Points, longest_gap: int = LONGEST_GAP) -> Video:
    """Crop the mouth out of a clip.

    Args:
        video: grey uint8 [frames, height, width].
        points: of every frame, from `FaceMesh.track`.
        longest_gap: frames in a row that may lack a face.

    Returns:
        uint8 [frames, 96, 96], the mouth's centre in the middle; what lies beyond the picture repeats its edge.

    Raises:
        NoFaceError: see `fill_gaps`.
    """
    points = smooth(fill_gaps(points, longest_gap))
    similarity = align(points)
    mouth_FX = points[:, _LIPS].mean(axis=1)
    crops = np.empty((len(video), CROP, CROP), np.uint8)
    for number, image in enumerate(video):
        linear_XY = similarity.linear_FXY[number]
        image, linear_XY, mouth_X = _shrunk(image, linear_XY, mouth_FX[number])
        shift_X = (CROP - 1) / 2 - linear_XY @ mouth_X
        matrix = np.concatenate([linear_XY, shift_X[:, None]], axis=1)
        crops[number] = cv2.warpAffine(
            image, matrix, (CROP, CROP), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return crops


def _shrunk(
    image: NDArray[np.uint8], linear_XY: NDArray[np.float32], mouth_X: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """A picture of a large face, made smaller by averaging first; with the similarity and the point that then hold."""
    factor = int(_SHRINK_BELOW / max(float(np.hypot(*linear_XY[0])), 1e-6)) + 1
    if factor <= 1:
        return image, linear_XY, mouth_X
    height, width = image.shape
    size = (max(width // factor, 1), max(height // factor, 1))
    ratio_X = np.array([size[0] / width, size[1] / height], np.float32)
    smaller = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    # Centres of pixels, not their corners, are at whole numbers.
    return smaller, linear_XY / ratio_X, (mouth_X + 0.5) * ratio_X - 0.5


def is_mouth_crop(video: Video) -> bool:
    """Whether a clip is a mouth crop already."""
    return video.shape[1:] == (CROP, CROP)
