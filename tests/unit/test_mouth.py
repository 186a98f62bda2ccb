"""Points of a face and the crop of its mouth: MediaPipe's own points, and crops that ignore how a face is turned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from mome_dist.assets import registry
from mome_dist.data.media import Video
from mome_dist.data.preparation import mouth
from mome_dist.data.preparation.landmarks import LIPS, POINTS, STABLE, FaceMesh, Points
from mome_dist.data.preparation.mouth import MEAN_FACE_PX, NoFaceError, align, crop_mouth, fill_gaps, smooth
from mome_dist.errors import UserError
from tests.face_films import face_video

FRAMES = 100
# Written by MediaPipe 0.10.21's own Python class FaceMesh (with protobuf 4.25.8) on the frames of this film, the first
# one four times.
REFERENCE = json.loads((Path(__file__).parents[1] / "data/face_mesh.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mesh() -> FaceMesh:
    return FaceMesh()


@pytest.fixture(scope="module")
def film() -> Video:
    return face_video(FRAMES)


@pytest.fixture(scope="module")
def points(mesh: FaceMesh, film: Video) -> Points:
    return mesh.track(film)


def stacked(images: Iterable[np.ndarray]) -> Video:
    """Grey pictures as a clip."""
    return np.stack([np.asarray(image, np.uint8) for image in images])


def test_points_are_those_of_mediapipes_own_class(points: Points) -> None:
    assert points.shape == (FRAMES, len(STABLE) + len(LIPS), 2)
    for frame, expected in REFERENCE.items():
        # Two decimals in the file; another CPU sums the networks' products in another order.
        np.testing.assert_allclose(points[int(frame)], expected, rtol=0, atol=0.05)


def test_a_clip_does_not_depend_on_the_one_before(mesh: FaceMesh, film: Video, points: Points) -> None:
    mesh.track(film[::-1][:7])
    np.testing.assert_array_equal(mesh.track(film[:20]), points[:20])


def test_frames_without_a_face_are_nan(mesh: FaceMesh, film: Video) -> None:
    clip = film[:12].copy()
    clip[4:8] = 90
    found = ~np.isnan(mesh.track(clip)).any((1, 2))
    assert found.tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_the_runner_says_nothing_on_stderr() -> None:
    code = "from tests.face_films import face_video; from mome_dist.data.preparation.landmarks import FaceMesh; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}FaceMesh().track(face_video(2))"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_without_a_build_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOME_DIST_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'face-mesh' is not usable.*tools/fetch_assets\.py"):
        FaceMesh()
    monkeypatch.delitem(registry.ASSETS, registry.FACE_MESH)
    with pytest.raises(UserError, match=r"no build for Python .* or give 96x96 mouth crops"):
        FaceMesh()
    assert registry._face_mesh_of((3, 13), "x86_64") is registry._face_mesh_of((3, 11), "aarch64") is None


# --- filling, smoothing, aligning ----------------------------------------------------------------------------------


def test_short_gaps_are_bridged_on_a_line() -> None:
    line = np.arange(12, dtype=np.float32)[:, None, None] * np.ones((1, len(POINTS), 2), np.float32)
    holes = line.copy()
    holes[[3, 4, 5]] = np.nan
    np.testing.assert_allclose(fill_gaps(holes, 3), line, atol=1e-6)
    holes[[0, 11]] = np.nan
    ends = fill_gaps(holes, 3)
    assert (ends[0] == line[1]).all() and (ends[11] == line[10]).all()
    with pytest.raises(NoFaceError, match=r"no face in 5 of 12 frames, 3 of them in a row \(at most 2"):
        fill_gaps(holes, 2)
    with pytest.raises(NoFaceError, match="no face in 12 of 12 frames, 12 of them in a row"):
        fill_gaps(np.full_like(holes, np.nan), 25)


def test_smoothing_keeps_the_place_and_averages_the_shape() -> None:
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(1, len(POINTS), 2))
    walk = rng.normal(size=(40, 1, 2)).cumsum(0)
    noisy = (shape + walk + rng.normal(0, 0.5, (40, len(POINTS), 2))).astype(np.float32)
    result = smooth(noisy)
    np.testing.assert_allclose(result.mean(1), noisy.mean(1), atol=1e-5)
    window = (noisy - noisy.mean(1, keepdims=True))[14:27].mean(0)
    np.testing.assert_allclose(result[20] - result[20].mean(0), window, atol=1e-5)
    np.testing.assert_allclose(result[0], noisy[0], atol=1e-5)  # no frames before it: none after it either


def test_alignment_undoes_any_similarity() -> None:
    rng = np.random.default_rng(1)
    angle, scale = rng.uniform(-1, 1, 9), rng.uniform(0.3, 3, 9)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    moved = np.einsum("f,fxy,py->fpx", scale, turn, MEAN_FACE_PX) + rng.uniform(-50, 300, (9, 1, 2))
    similarity = align(moved.astype(np.float32))
    back = np.einsum("fxy,fpy->fpx", similarity.linear_FXY, moved) + similarity.shift_FX[:, None]
    np.testing.assert_allclose(back, np.broadcast_to(MEAN_FACE_PX, back.shape), atol=2e-3)


def test_alignment_is_the_least_squares_one(points: Points) -> None:
    source = points[:1, : len(STABLE)].astype(np.float64)
    # x' = a x - b y + c, y' = b x + a y + d: linear in a, b, c, d.
    x, y = source[0].T
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
    a, b, c, d = np.linalg.lstsq(rows, MEAN_FACE_PX.T.ravel(), rcond=None)[0]
    similarity = align(points[:1])
    np.testing.assert_allclose(similarity.linear_FXY[0], [[a, -b], [b, a]], rtol=1e-4)
    np.testing.assert_allclose(similarity.shift_FX[0], [c, d], rtol=1e-4)


# --- the crop ------------------------------------------------------------------------------------------------------


def test_the_mouth_is_in_the_middle_of_its_crop(mesh: FaceMesh, film: Video, points: Points) -> None:
    """The crops are seen by the mesh again, inside the face that they were cut from."""
    crops = crop_mouth(film, points)
    assert crops.shape == (FRAMES, 96, 96) and crops.dtype == np.uint8
    moved = smooth(points)
    similarity = align(moved)
    lips = np.einsum("fxy,fpy->fpx", similarity.linear_FXY, moved[:, len(STABLE) :])
    lips += 47.5 - lips.mean(1, keepdims=True)
    assert lips.min() > 4 and lips.max() < 91, "the lips are inside the crop"
    matrices = np.concatenate([similarity.linear_FXY, similarity.shift_FX[..., None]], axis=2)
    whole = stacked(cv2.warpAffine(image, matrix, (256, 256)) for image, matrix in zip(film, matrices, strict=True))
    again = mesh.track(whole)
    eyes = again[:, : len(STABLE)].mean(0)
    assert np.abs(eyes - MEAN_FACE_PX).max() < 10, "the aligned face is about the mean face"
    centers = again[:, len(STABLE) :].mean(1).round().astype(int)
    for number in range(0, FRAMES, 9):
        x, y = centers[number]
        there = whole[number, y - 48 : y + 48, x - 48 : x + 48].astype(float)
        # The same mouth, but for the mesh's jitter of a pixel or two.
        assert np.corrcoef(there.ravel(), crops[number].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("factor", [3.0, 8.0])
def test_the_size_of_the_film_does_not_matter(mesh: FaceMesh, film: Video, factor: float) -> None:
    """A face larger than the mean face is shrunk by averaging, so it gives the same crop as a small one."""
    clip = film[:20]
    size = (round(176 * factor), round(144 * factor))
    larger = stacked(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) for image in clip)
    small, large = crop_mouth(clip, mesh.track(clip)), crop_mouth(larger, mesh.track(larger))
    assert np.abs(small.astype(int) - large).mean() < 2


def test_a_tilted_face_gives_an_upright_mouth(mesh: FaceMesh, film: Video) -> None:
    clip = film[:20]
    matrix = cv2.getRotationMatrix2D((88, 72), 25, 1.0)
    tilted = stacked(cv2.warpAffine(image, matrix, (176, 144), borderMode=cv2.BORDER_REPLICATE) for image in clip)
    upright, turned = crop_mouth(clip, mesh.track(clip)), crop_mouth(tilted, mesh.track(tilted))
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(upright, turned, strict=True)]
    assert min(same) > 0.95
    lazy = np.stack([image[60:156, 40:136] for image in np.pad(tilted, ((0, 0), (0, 60), (0, 0)))])
    assert abs(np.corrcoef(upright[0].ravel(), lazy[0].ravel())[0, 1]) < 0.8, "the comparison tells crops apart"


def test_a_large_face_is_not_sampled_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine noise on a face of 16 times the mean size averages out instead of coming back as noise."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 256 * 16, 256 * 16), np.uint8)
    lips = np.array([[128, 189]] * len(LIPS))
    face = (np.concatenate([MEAN_FACE_PX, lips])[None] * 16).astype(np.float32)
    averaged = crop_mouth(noise, face).std()
    monkeypatch.setattr(mouth, "_SHRINK_BELOW", 0.0)
    sparse = crop_mouth(noise, face).std()
    # A mean of 8 x 8 independent values has an eighth of their spread.
    assert averaged < 1.1 * 74 / 8 and sparse > 30
