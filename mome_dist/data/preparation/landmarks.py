"""Points of the face in every frame, by MediaPipe's face mesh.

The mesh is a graph of two small networks: one finds the face in the first frame and wherever it was lost, the other
puts 468 points on it, starting from the place of the frame before. Only the points that alignment and cropping need
are kept, in the order of `POINTS`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from cv2.typing import MatLike

from mome_dist.assets import asset_dir
from mome_dist.assets.face_mesh import GRAPH, runner_path
from mome_dist.assets.registry import ASSETS, FACE_MESH
from mome_dist.data.films import Picture
from mome_dist.data.media import FPS
from mome_dist.data.preparation.alignment import FRAME, POINTS, Points, to_mean_face
from mome_dist.errors import UserError

_MESH_POINTS = 468
_LOOKS_BEFORE = 3
_MICROSECONDS_PER_FRAME = 1_000_000 // FPS
# A serialised NormalizedLandmarkList: 468 messages (field 1, 15 bytes) of three floats (fields 1, 2 and 3).
_POINT = np.dtype(
    [("head", "V3"), ("x", "<f4"), ("tag_y", "u1"), ("y", "<f4"), ("tag_z", "u1"), ("z", "<f4")], align=False
)
_HEAD, _TAG_Y, _TAG_Z = b"\x0a\x0f\x0d", 0x15, 0x1D

_PERIOD = 100  # frames: a second look is taken when a face appears, and this often while it stays
_CLEARLY = 0.1  # in the detector's score
_LOOK = 128  # pixels: side of the picture that the face detector's network sees
_DETECTOR = """
input_stream: "image"
output_stream: "faces"
node {
  calculator: "FaceDetectionShortRangeCpu"
  input_stream: "IMAGE:image"
  output_stream: "DETECTIONS:faces"
}
"""
# A serialised Detection starts with one label (field 2) and one score (field 3, a float).
_SCORE = b"\x12\x01\x00\x1a\x04"


class FaceMesh:
    """Finds the face in every frame of a clip. Making one loads the networks; a process may use it for any clips.

    The mesh follows what it takes for a face: in a face that is upside down it sees eyes as a mouth, frame after frame.
    So there is a second look, by the network that finds faces: what the points have brought upright must look more like
    a face than the same picture upside down. Right faces did by 0.06 to 0.9 of its score, wrong ones by -0.9 to 0.05.

    Raises:
        UserError: the asset is not in the cache, or MediaPipe has no build for this Python and machine.
    """

    def __init__(self) -> None:
        if FACE_MESH not in ASSETS:
            raise UserError(
                "faces are found with MediaPipe 0.10.21, which has no build for Python "
                f"{sys.version_info.major}.{sys.version_info.minor} on {platform.machine()}: use Python 3.11 or 3.12 "
                "on x86-64 Linux, or give 96x96 mouth crops that were made there"
            )
        directory = asset_dir(FACE_MESH)
        with _without_stderr():
            runner = _load_runner(runner_path(directory))
            runner.resource_util.set_resource_dir(str(directory))
        self._mesh = _Graph(runner, "multi_face_landmarks", binary_graph_path=str(directory / GRAPH))
        self._detector = _Graph(runner, "faces", graph_config=_DETECTOR)
        self._detector.start({})  # for good: it remembers nothing

    def track(self, pictures: Iterable[Picture]) -> Points:
        """Points of the most visible face in a clip of one shot.

        Args:
            pictures: of one size, one at least; they are gone through once, and none is kept.

        Returns:
            float32 [pictures, len(POINTS), 2]: NaN in pictures without a face, infinite in those with something else
            that the mesh takes for one. The result depends on this clip alone: what was seen in another one is
            forgotten.
        """
        packets = self._mesh.packets
        sides = {
            "num_faces": packets.create_int(1),
            "with_attention": packets.create_bool(False),
            "use_prev_landmarks": packets.create_bool(True),
        }
        found: list[Points] = []
        trusted = 0  # pictures until the next second look
        self._mesh.start(sides)
        try:
            for picture in pictures:
                if not found:  # points get better while they are followed: it is looked at before it counts
                    for _ in range(_LOOKS_BEFORE):
                        self._mesh.process(picture)
                points_PX = self._look(picture)
                if np.isnan(points_PX).any():
                    trusted = 0
                elif trusted:
                    trusted -= 1
                elif self._is_upright(picture, points_PX):
                    trusted = _PERIOD - 1
                else:
                    points_PX = np.full_like(points_PX, np.inf)
                found.append(points_PX)
        finally:
            self._mesh.stop()
        return np.stack(found)

    def _look(self, picture: Picture) -> Points:
        """Points of the face in the next picture, in its pixels: float32 [len(POINTS), 2], NaN without a face."""
        meshes = self._mesh.process(picture)
        if not meshes:
            return np.full((len(POINTS), 2), np.nan, np.float32)
        points_PX: Points = parse_landmarks(meshes[0])[list(POINTS)] * np.array(picture.shape[::-1], np.float32)
        return points_PX

    def _is_upright(self, picture: Picture, points_PX: Points) -> bool:
        """Whether points show the face in a picture the right way up."""
        upright = cv2.warpAffine(picture, to_mean_face(points_PX) * (_LOOK / FRAME), (_LOOK, _LOOK))
        turned = cv2.rotate(upright, cv2.ROTATE_180)
        return self._score(upright) > self._score(turned) + _CLEARLY

    def _score(self, picture: MatLike) -> float:
        """How sure the detector is of a face, from 0.5 to 1; 0 where it finds none."""
        return max(map(parse_score, self._detector.process(picture)), default=0.0)


class _Graph:
    """A graph of MediaPipe that reads pictures from ``image`` and writes serialised results to one stream."""

    def __init__(self, runner: ModuleType, output: str, **source: str) -> None:
        self.packets = runner._packet_creator
        self._runner, self._output = runner, output
        self._found: dict[str, Any] = {}
        with _without_stderr():
            self._graph = runner.calculator_graph.CalculatorGraph(**source)
        self._graph.observe_output_stream(output, self._found.__setitem__, True)

    def start(self, sides: dict[str, Any]) -> None:
        """Start with input side packets and without any memory."""
        self._microseconds = 0
        with _without_stderr():
            self._graph.start_run(sides)
            self._graph.wait_until_idle()  # its threads open the networks, which tell of it

    def stop(self) -> None:
        """End what `start` began; it may be started again."""
        with _without_stderr():
            self._graph.close()

    def process(self, picture: MatLike) -> list[bytes]:
        """What is found in the next picture."""
        self._found.clear()
        self._microseconds += _MICROSECONDS_PER_FRAME
        with _without_stderr():
            packet = self.packets._create_image_frame_from_pixel_data(
                self._runner.image_frame.ImageFormat.SRGB, cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB), False
            )
            self._graph.add_packet_to_input_stream(
                "image", packet.at(self._runner.timestamp.Timestamp(self._microseconds))
            )
            self._graph.wait_until_idle()
        found = self._found.get(self._output)
        if found is None or found.is_empty():
            return []
        serialised: list[bytes] = self._runner._packet_getter._get_serialized_proto_list(found)
        return serialised


def parse_landmarks(serialised: bytes) -> Points:
    """x and y of a serialised ``mediapipe.NormalizedLandmarkList`` of the mesh: float32 [468, 2].

    Read here, because MediaPipe's own classes for it need protobuf 4.
    """
    records = np.frombuffer(serialised, _POINT)
    assert len(records) == _MESH_POINTS and records["head"].tobytes() == _HEAD * _MESH_POINTS, "not the mesh's points"
    assert (records["tag_y"] == _TAG_Y).all() and (records["tag_z"] == _TAG_Z).all(), "not the mesh's points"
    return np.stack([records["x"], records["y"]], axis=1)


def parse_score(serialised: bytes) -> float:
    """The score of a serialised ``mediapipe.Detection``."""
    assert serialised.startswith(_SCORE), "not a face of the detector"
    return float(np.frombuffer(serialised, "<f4", 1, len(_SCORE))[0])


@cache
def _load_runner(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_framework_bindings", path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{path} cannot be loaded ({error}): MediaPipe needs glibc 2.28 or newer on x86-64") from error
    return module


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep C++ from writing to stderr: the runner tells of its networks and of classes that it does without, whatever
    the log level. What fails is a Python exception all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
