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
from mome_dist.data.preparation.alignment import (
    LIPS,
    MEAN_FACE_PX,
    POINTS,
    STABLE,
    Points,
    align,
    averaged,
    centers,
    to_mean_face,
)
from mome_dist.data.preparation.landmarks import FaceMesh
from mome_dist.data.preparation.mouth import NoFaceError, fill_gaps
from mome_dist.errors import UserError
from mome_dist.speech.geometry import AVHUBERT, RENDERED
from tests.face_films import crop_mouth, face_video

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
    with pytest.raises(UserError, match=r"'face-mesh' is not usable.*mome-dist fetch"):
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
    np.testing.assert_allclose(fill_gaps(holes, 3, least=0.5), line, atol=1e-6)
    holes[[0, 11]] = np.nan
    ends = fill_gaps(holes, 3, least=0.5)
    assert (ends[0] == line[1]).all() and (ends[11] == line[10]).all()
    with pytest.raises(NoFaceError, match=r"no face in 5 of 12 frames, 3 of them in a row \(at most 2 are"):
        fill_gaps(holes, 2)
    with pytest.raises(NoFaceError, match="no face in 12 of 12 frames, 12 of them in a row"):
        fill_gaps(np.full_like(holes, np.nan), 25)


def test_too_few_faces_are_told_by_their_share() -> None:
    """Five faces in thirty frames, no gap of them long."""
    points = np.full((30, len(POINTS), 2), np.nan, np.float32)
    points[2::6] = 1.0
    with pytest.raises(NoFaceError, match=r"25 of 30 frames, 5 of them in a row \(at least 75% must show one\)"):
        fill_gaps(points)
    assert np.isfinite(fill_gaps(points, least=5 / 30)).all()
    points[3:5] = np.inf
    with pytest.raises(
        NoFaceError, match=r"no face in 25 of 30 frames \(2 show something that was taken for one, such"
    ):
        fill_gaps(points)


def test_points_are_averaged_from_a_frame_on() -> None:
    points = np.random.default_rng(0).normal(size=(40, len(POINTS), 2)).astype(np.float32)
    result = averaged(points)
    np.testing.assert_allclose(result[20], points[20:32].mean(0), atol=1e-6)
    for frame in range(28, 40):  # when the film ends, the last whole window is kept
        np.testing.assert_allclose(result[frame], points[28:40].mean(0), atol=1e-6)
    np.testing.assert_allclose(averaged(points[:5])[3], points[:5].mean(0), atol=1e-6)


def test_alignment_undoes_any_similarity() -> None:
    rng = np.random.default_rng(1)
    angle, scale = rng.uniform(-1, 1, 9), rng.uniform(0.3, 3, 9)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    moved = np.einsum("f,fxy,py->fpx", scale, turn, MEAN_FACE_PX) + rng.uniform(-50, 300, (9, 1, 2))
    expected = np.linalg.inv(scale[:, None, None] * turn)
    np.testing.assert_allclose(align(moved.astype(np.float32)), expected, rtol=1e-4, atol=1e-5)
    for frame in moved.astype(np.float32):
        matrix = to_mean_face(frame)
        np.testing.assert_allclose(frame @ matrix[:, :2].T + matrix[:, 2], MEAN_FACE_PX, atol=2e-3)


# --- the crop ------------------------------------------------------------------------------------------------------


def test_the_mouth_is_in_the_middle_of_its_crop(mesh: FaceMesh, film: Video, points: Points) -> None:
    """Aligned faces are seen by the mesh again: eyes and nose as on the mean face, and around the lips what was cut."""
    crops = crop_mouth(film, points)
    assert crops.shape == (FRAMES, 96, 96) and crops.dtype == np.uint8
    matrices = [to_mean_face(frame) for frame in points]
    whole = stacked(cv2.warpAffine(image, matrix, (256, 256)) for image, matrix in zip(film, matrices, strict=True))
    again = mesh.track(whole)
    assert np.abs(again[:, : len(STABLE)].mean(0) - MEAN_FACE_PX).max() < 8, "the aligned face is about the mean face"
    lips = again[:, len(STABLE) :] - centers(again)[:, None] + 48
    assert lips.min() > 12 and lips.max() < 84, "the lips are inside the crop"
    for number, (x, y) in enumerate(centers(again).round().astype(int)[:50]):  # here the head does not tilt
        there = whole[number, y - 48 : y + 48, x - 48 : x + 48].astype(float)
        # The same mouth, but for the mesh's jitter of a pixel or two.
        assert np.corrcoef(there.ravel(), crops[number].ravel())[0, 1] > 0.9


def test_mouths_like_the_drawn_ones_are_larger(film: Video, points: Points) -> None:
    """A film is cropped for an encoder of the synthetic corpus with mouths as wide as the drawn ones."""
    (plain,), (larger,) = (crop_mouth(film[:1], points[:1], geometry=name) for name in (AVHUBERT, RENDERED))
    zoom = 53 / 45
    matrix = np.array([[zoom, 0, 48 - zoom * 48], [0, zoom, 48 - zoom * 48]])
    expected = cv2.warpAffine(plain, matrix, (96, 96))
    assert np.abs(larger.astype(int) - expected).mean() < 2


@pytest.mark.parametrize(
    ("quarters", "flipped"),
    [(2, False), (1, False), (0, True)],
    ids=["upside down", "turned left", "mirrored at the floor"],
)
def test_eyes_are_never_taken_for_a_mouth(mesh: FaceMesh, film: Video, quarters: int, flipped: bool) -> None:
    """In films whose metadata was lost, the mesh sees a face in 29, 43 and 74 of 100 frames, always upside down."""
    turned = np.ascontiguousarray(np.rot90(film[:, ::-1] if flipped else film, quarters, (1, 2)))
    points = mesh.track(turned)
    assert np.isinf(points).any() and not np.isfinite(points).any()
    with pytest.raises(NoFaceError, match=r"show something that was taken for one, such as a face upside down"):
        crop_mouth(turned, points)


def test_a_film_turned_to_the_right_gives_upright_mouths(mesh: FaceMesh, film: Video) -> None:
    clip = film[:20]
    turned = np.ascontiguousarray(np.rot90(clip, 3, (1, 2)))
    for a, b in zip(crop_mouth(clip, mesh.track(clip)), crop_mouth(turned, mesh.track(turned)), strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


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
    lips = np.array([[129, 158]] * len(LIPS))
    face = (np.concatenate([MEAN_FACE_PX, lips])[None] * 16).astype(np.float32)
    averaged = crop_mouth(noise, face).std()
    monkeypatch.setattr(mouth, "_SHRINK_BELOW", 0.0)
    sparse = crop_mouth(noise, face).std()
    # A mean of 8 x 8 independent values has an eighth of their spread.
    assert averaged < 1.1 * 74 / 8 and sparse > 30
