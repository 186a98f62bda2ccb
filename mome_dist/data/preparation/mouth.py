"""From points of a face to a steady 96x96 crop of its mouth, as published lip readers know it.

The recipe is AV-HuBERT's (Shi et al., 2022: ``align_mouth.py``). Rotation and scale of a frame are those of the
similarity that brings its stable points, averaged over 12 frames from this one on (the last 12 ones at the end),
closest to the field's mean face in a frame of 256x256; the crop is cut there around the mean of this frame's own lip
points. Stable points are points that speech hardly moves, so that an open mouth does not shrink the face.

What differs from the recipe, in pixels of the crop:

- The points are MediaPipe's, not dlib's. On a small face (28 pixels between the eyes) scale differs by 0.5 % in the
  mean and 2 % at most, rotation by 0.8 and 1.6 degrees, the centre by 1.8 and 5.6 pixels, the most where dlib misses an
  open mouth; the recipe's own points, rounded to whole pixels of such a film, scatter as much.
- The centre lies at (48, 48) exactly; the recipe rounds it to whole pixels: up to 0.5.
- The crop follows the mouth wherever it is; the recipe keeps its window inside the frame of 256x256, so a mouth that
  moves by more than 50 pixels within the window of time is off its centre.
- Faces more than twice as large as the mean face are averaged before they are sampled; the recipe samples sparsely.
- Grey values are rounded; the recipe cuts the fraction off: half a grey level. Both are luma of full range, here that
  of the film, there BT.601's of decoded colours.

What lies beyond the picture is black in both. auto_avsr (Ma et al., 2023) aligns to the same mean face, with 6 frames
on either side instead of 12 from the frame on, which turns the crop by up to 9 degrees while a head tilts fast.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import FPS
from mome_dist.data.preparation.alignment import Linear, Points, align, averaged, centers
from mome_dist.errors import UserError
from mome_dist.speech.geometry import AVHUBERT, RENDERED

CROP = 96
CENTER = CROP / 2  # the pixel, in x and y, where the crop has the mean of the lip points
LONGEST_GAP = FPS  # frames in a row that may lack a face: a second
LEAST_FACES = 0.75  # of the frames must show one
# How much larger than on the mean face (45 pixels from corner to corner) mouths are; drawn ones are 53 wide.
ZOOM = {AVHUBERT: 1.0, RENDERED: 53 / 45}

_SHRINK_BELOW = 0.5  # a face larger than this would alias under bilinear sampling


class NoFaceError(UserError):
    """A clip shows no face for too long, or in too few of its frames."""


def fill_gaps(points: Points, longest: int = LONGEST_GAP, least: float = LEAST_FACES) -> Points:
    """Points of frames without a face, on a straight line between the frames around them (or as in the nearest one).

    Raises:
        NoFaceError: less than a share of ``least`` of the frames has a face, or more than ``longest`` in a row have
            none; the message has the counts.
    """
    found = np.isfinite(points[:, 0, 0])
    if found.all():
        return points
    marks = np.flatnonzero(np.concatenate(([True], found, [True])))
    gap = int(np.diff(marks).max()) - 1
    faces = int(found.sum())
    if gap > longest or faces < max(least * len(found), 1):
        denied = int(np.isinf(points[:, 0, 0]).sum())
        how = f" ({denied} show something that was taken for one, such as a face upside down)" if denied else ""
        limit = f"at most {longest} are bridged" if gap > longest else f"at least {least:.0%} must show one"
        missing = f"{len(found) - faces} of {len(found)} frames{how}"
        raise NoFaceError(f"no face in {missing}, {gap} of them in a row ({limit})")
    frames, known = np.arange(len(found)), np.flatnonzero(found)
    flat = points.reshape(len(points), -1)
    filled = np.stack([np.interp(frames, known, column[found]) for column in flat.T], axis=1)
    return filled.reshape(points.shape).astype(np.float32)


def crop_frame(image_HW: NDArray[np.uint8], linear_XY: Linear, center_X: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Cut one crop.

    Args:
        image_HW: grey uint8 [height, width].
        linear_XY: rotation and scale, from `align`, times the `ZOOM` of a geometry.
        center_X: of the mouth in the picture, from `centers`.

    Returns:
        uint8 [96, 96]; what lies beyond the picture is black.
    """
    image_HW, linear_XY, center_X = _shrunk(image_HW, linear_XY, center_X)
    shift_X = CENTER - linear_XY @ center_X
    matrix = np.concatenate([linear_XY, shift_X[:, None]], axis=1)
    crop = cv2.warpAffine(image_HW, matrix, (CROP, CROP), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return crop.astype(np.uint8, copy=False)


class CropPlan(NamedTuple):
    """How to cut each frame of a clip.

    Attributes:
        linear_FXY: rotation and scale, float32 [frames, 2, 2].
        center_FX: of the mouth in the picture, float32 [frames, 2].
    """

    linear_FXY: Linear
    center_FX: NDArray[np.float32]

    def crop(self, image_HW: NDArray[np.uint8], frame: int) -> NDArray[np.uint8]:
        """The crop of a frame, see `crop_frame`."""
        return crop_frame(image_HW, self.linear_FXY[frame], self.center_FX[frame])


def plan_crops(
    points: Points, longest_gap: int = LONGEST_GAP, least_faces: float = LEAST_FACES, geometry: str = AVHUBERT
) -> CropPlan:
    """Decide how to cut the mouth out of a clip.

    Args:
        points: of every frame, from `FaceMesh.track`.
        longest_gap: frames in a row that may lack a face.
        least_faces: share of the frames that must show one.
        geometry: see `mome_dist.speech.geometry`.

    Raises:
        NoFaceError: see `fill_gaps`.
    """
    points = fill_gaps(points, longest_gap, least_faces)
    return CropPlan(align(averaged(points)) * np.float32(ZOOM[geometry]), centers(points))


def _shrunk(
    image: NDArray[np.uint8], linear_XY: Linear, center_X: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], Linear, NDArray[np.float32]]:
    """A picture of a large face, made smaller by averaging first; with the similarity and the point that then hold."""
    factor = int(_SHRINK_BELOW / max(float(np.hypot(*linear_XY[0])), 1e-6)) + 1
    if factor <= 1:
        return image, linear_XY, center_X
    height, width = image.shape
    size = (max(width // factor, 1), max(height // factor, 1))
    ratio_X = np.array([size[0] / width, size[1] / height], np.float32)
    smaller = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    # Centres of pixels, not their corners, are at whole numbers.
    return smaller, linear_XY / ratio_X, (center_X + 0.5) * ratio_X - 0.5
