"""Crops against the field's recipe (AV-HuBERT's ``align_mouth.py``), which is written here a second time: another
least-squares solver, a whole frame of 256x256, a window cut out of it, and dlib's 68 points where the tests say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mome_dist.data.media import Video
from mome_dist.data.preparation.alignment import LIPS, STABLE, Points, align, averaged, centers
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import CROP
from tests.face_films import crop_mouth, face_video

FRAMES = 100
DLIB = json.loads((Path(__file__).parents[1] / "data/face_68.json").read_text(encoding="utf-8"))
# Points 33, 36, 39, 42 and 45 of the mean face of 68 points, to the digits of the file that the recipe reads.
MEAN_FACE = np.array([[128.870, 137.303], [92.522, 94.369], [112.772, 94.944], [145.525, 94.535], [166.677, 93.566]])


class Placement(NamedTuple):
    """The recipe's transforms [frames, 2, 3] to the frame of 256x256, and where the mouth is: in it, in the picture."""

    matrix_FXY: NDArray[np.float64]
    there_FX: NDArray[np.float64]
    here_FX: NDArray[np.float64]


def recipe(stable_FPX: NDArray[np.floating], lips_FPX: NDArray[np.floating]) -> Placement:
    """Twelve frames from each on are averaged; when the film ends, the last transform is kept."""
    matrices = []
    for frame in range(len(stable_FPX)):
        if frame + 12 <= len(stable_FPX):
            x, y = stable_FPX[frame : frame + 12].mean(axis=0).T
            ones, zeros = np.ones_like(x), np.zeros_like(x)
            # x' = a x - b y + c, y' = b x + a y + d: linear in a, b, c, d.
            rows = np.concatenate([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
            a, b, c, d = np.linalg.lstsq(rows, MEAN_FACE.T.ravel(), rcond=None)[0]
            matrix = np.array([[a, -b, c], [b, a, d]])
        matrices.append(matrix)
    matrix_FXY, here_FX = np.stack(matrices), lips_FPX.mean(axis=1)
    there_FX = np.einsum("fxy,fy->fx", matrix_FXY[:, :, :2], here_FX) + matrix_FXY[:, :, 2]
    return Placement(matrix_FXY, there_FX, here_FX)


def recipe_crops(film: Video, placement: Placement) -> Video:
    """Frames warped whole, then cut at whole pixels."""
    crops = []
    for image, matrix, there in zip(film, placement.matrix_FXY, placement.there_FX, strict=True):
        whole = cv2.warpAffine(image, matrix, (256, 256), flags=cv2.INTER_LINEAR)
        x, y = (round(float(value)) for value in there)
        crops.append(whole[y - 48 : y + 48, x - 48 : x + 48])
    return np.stack(crops).astype(np.uint8)


def differences(expected: Placement, points: Points) -> NDArray[np.float64]:
    """Ours against the recipe's, [frames, 4]: scale in %, rotation in degrees, the crop's place in its x and y."""
    ours, theirs = align(averaged(points)).astype(np.float64), expected.matrix_FXY[:, :, :2]
    scale = 100 * (np.hypot(*ours[:, 0].T) / np.hypot(*theirs[:, 0].T) - 1)
    turn = np.degrees(np.arctan2(ours[:, 1, 0], ours[:, 0, 0]) - np.arctan2(theirs[:, 1, 0], theirs[:, 0, 0]))
    shift = np.einsum("fxy,fy->fx", theirs, centers(points) - expected.here_FX)
    return np.column_stack([scale, turn, shift])


def table(rows: NDArray[np.float64]) -> str:
    lines = ["frame  scale %  turn deg  x px  y px"]
    lines += [f"{frame:5} {row[0]:8.2f} {row[1]:9.2f} {row[2]:5.2f} {row[3]:5.2f}" for frame, row in enumerate(rows)]
    for name, row in (("mean", rows.mean(0)), ("worst", np.abs(rows).max(0)), ("middle", np.median(np.abs(rows), 0))):
        lines.append(f"{name:>6}{row[0]:8.2f} {row[1]:9.2f} {row[2]:5.2f} {row[3]:5.2f}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def film() -> Video:
    return face_video(FRAMES)


@pytest.fixture(scope="module")
def points(film: Video) -> Points:
    return FaceMesh().track(film)


def test_every_frame_is_placed_as_the_recipe_places_it(film: Video, points: Points) -> None:
    """On the same points: what is left is the recipe's rounding of the place to whole pixels."""
    expected = recipe(points[:, : len(STABLE)], points[:, len(STABLE) :])
    rows = differences(expected, points)
    assert np.abs(rows).max(0)[0] < 0.2 and np.abs(rows[:, 1:]).max() < 0.05, table(rows)
    whole_pixels = np.round(expected.there_FX) - expected.there_FX
    for ours, theirs, off in zip(crop_mouth(film, points), recipe_crops(film, expected), whole_pixels, strict=True):
        back = cv2.warpAffine(theirs, np.array([[1, 0, off[0]], [0, 1, off[1]]]), (CROP, CROP))
        inner = slice(2, -2)
        assert np.abs(ours[inner, inner].astype(int) - back[inner, inner]).mean() < 1.5


def test_crops_agree_with_those_of_dlibs_68_points(film: Video, points: Points, tmp_path: Path) -> None:
    """The true recipe, on points that no part of ours had a hand in. The film's face is small: a pixel of it is 2.6 of
    the crop, and where the mouth opens wide (the last frames) dlib misses the lower lip."""
    dlib = np.array(DLIB["frames"])
    expected = recipe(dlib[:, : len(STABLE)], dlib[:, len(STABLE) :])
    rows = differences(expected, points)
    ours, theirs = crop_mouth(film, points), recipe_crops(film, expected)
    (tmp_path / "differences.txt").write_text(table(rows) + "\n", encoding="utf-8")
    sheet = np.concatenate([np.concatenate(crops[::12], axis=1) for crops in (theirs, ours)])
    cv2.imwrite(str(tmp_path / "recipe_above_ours.png"), sheet)
    print(f"{table(rows)}\nlook at {tmp_path}/recipe_above_ours.png")
    mean, middle = np.abs(rows.mean(0)), np.median(np.abs(rows), 0)
    assert mean[0] < 2 and mean[1] < 1 and mean[2:].max() < 2
    assert middle[0] < 2 and middle[1] < 1.1 and middle[2:].max() < 2
    assert np.abs(rows[:, 0]).max() < 2.2 and np.abs(rows[:, 1]).max() < 2
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True)]
    assert np.median(same) > 0.9


def test_the_mesh_has_the_points_of_the_68_point_scheme() -> None:
    assert len(STABLE) == len(DLIB["points"][:5]) and len(LIPS) == 20
