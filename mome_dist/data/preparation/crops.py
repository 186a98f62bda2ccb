"""Mouth crops of a film, part by part, in bounded memory: the face is followed through it, then the mouth is cut out.

A film is gone through twice, since what turns a picture upright depends on pictures after it. A small one is kept in
between, a large one is decoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mome_dist.data.films import Film, Picture
from mome_dist.data.media import Video
from mome_dist.data.preparation.alignment import Points
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import CROP, LEAST_FACES, LONGEST_GAP, CropPlan, NoFaceError, plan_crops
from mome_dist.speech.geometry import AVHUBERT

_KEPT_BYTES = 128 << 20  # of pictures: 100 s of 224 x 224

Part = tuple[int, int]
"""Pictures of a film, from the first to before the last."""


def mouth_crops(
    film: Film,
    parts: Sequence[Part],
    mesh: Callable[[], FaceMesh],
    longest_gap: int = LONGEST_GAP,
    least_faces: float = LEAST_FACES,
    geometry: str = AVHUBERT,
) -> Iterator[Video | NoFaceError]:
    """The mouth in each part: uint8 [pictures, 96, 96], or why there is none. A film of crops is taken as it is.

    Args:
        film: one with pictures.
        parts: ascending; they do not overlap.
        mesh: gives the face mesh, where it is needed.
        longest_gap: pictures in a row that may lack a face.
        least_faces: share of a part's pictures that must show one.
        geometry: of the crops, see `mome_dist.speech.geometry`.

    Raises:
        UserError: the film cannot be decoded, or MediaPipe is missing.
    """
    first_picture = next(film.pictures())
    pictures = _pictures(film, first_picture.nbytes)
    plans: list[CropPlan | NoFaceError | None] = [None] * len(parts)
    if first_picture.shape != (CROP, CROP):
        points = mesh().track(pictures())
        plans = [_plan(points[first:last], longest_gap, least_faces, geometry) for first, last in parts]
    numbered = enumerate(pictures())
    for (first, last), plan in zip(parts, plans, strict=True):
        if isinstance(plan, NoFaceError):
            yield plan
            continue
        crops = np.empty((last - first, CROP, CROP), np.uint8)
        for number, picture in numbered:
            if (here := number - first) >= 0:
                crops[here] = picture if plan is None else plan.crop(picture, here)
            if number == last - 1:
                break
        yield crops


def _pictures(film: Film, picture_bytes: int) -> Callable[[], Iterable[Picture]]:
    """What gives all pictures of a film, more than once."""
    if film.frames * picture_bytes > _KEPT_BYTES:
        return film.pictures
    video = film.video()
    return lambda: video


def _plan(points: Points, longest_gap: int, least_faces: float, geometry: str) -> CropPlan | NoFaceError:
    try:
        return plan_crops(points, longest_gap, least_faces, geometry)
    except NoFaceError as error:
        return error
