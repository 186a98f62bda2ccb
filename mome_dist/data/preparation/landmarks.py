"""Points of the face in every frame, by MediaPipe's face mesh.

The mesh is a graph of two small networks: one finds the face in the first frame and wherever it was lost, the other
puts 468 points on it, starting from the place of the frame before. Only the points that alignment and cropping need
are kept, in the order of `POINTS`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mome_dist.assets import asset_dir
from mome_dist.assets.face_mesh import GRAPH, runner_path
from mome_dist.assets.registry import ASSETS, FACE_MESH
from mome_dist.data.media import FPS, Video
from mome_dist.errors import UserError

# Numbers of the mesh's points. The outer ring of the lips, and what hardly moves in speech: corners of the eyes (the
# viewer's left eye first), and the point under the nose.
STABLE = (33, 133, 362, 263, 2)
LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
POINTS = (*STABLE, *LIPS)

_MESH_POINTS = 468
_LOOKS_BEFORE = 3
_MICROSECONDS_PER_FRAME = 1_000_000 // FPS
_OUTPUT = "multi_face_landmarks"
# A serialised NormalizedLandmarkList: 468 messages (field 1, 15 bytes) of three floats (fields 1, 2 and 3).
_POINT = np.dtype(
    [("head", "V3"), ("x", "<f4"), ("tag_y", "u1"), ("y", "<f4"), ("tag_z", "u1"), ("z", "<f4")], align=False
)
_HEAD, _TAG_Y, _TAG_Z = b"\x0a\x0f\x0d", 0x15, 0x1D

Points = NDArray[np.float32]
"""[frames, points, 2]: x and y in pixels, NaN where no face was found."""


class FaceMesh:
    """The face mesh. Making one loads the networks; a process may use it for any number of clips.

    Raises:
        UserError: the asset is not in the cache, or MediaPipe has no build for this Python and machine.
    """

    def __init__(self) -> None:
        if FACE_MESH not in ASSETS:
            raise UserError(
                f"faces are found with MediaPipe 0.10.21, which has no build for Python "
                f"{sys.version_info.major}.{sys.version_info.minor} on this machine: use Python 3.11 or 3.12 on "
                "x86-64 Linux, or give 96x96 mouth crops"
            )
        directory = asset_dir(FACE_MESH)
        with _without_stderr():
            self._runner = _load_runner(runner_path(directory))
            self._runner.resource_util.set_resource_dir(str(directory))
            self._graph = self._runner.calculator_graph.CalculatorGraph(binary_graph_path=str(directory / GRAPH))
        self._found: dict[str, Any] = {}
        self._graph.observe_output_stream(_OUTPUT, self._found.__setitem__, True)

    def track(self, video: Video) -> Points:
        """Points of the most visible face in a clip of one shot.

        Args:
            video: grey uint8 [frames, height, width].

        Returns:
            float32 [frames, len(POINTS), 2], NaN in frames without a face. The result depends on this clip alone: what
            was seen in another one is forgotten.
        """
        packets = self._runner._packet_creator
        points_FPX = np.full((len(video), len(POINTS), 2), np.nan, np.float32)
        size_X = np.array(video.shape[:0:-1], np.float32)
        with _without_stderr():
            self._graph.start_run(
                {
                    "num_faces": packets.create_int(1),
                    "with_attention": packets.create_bool(False),
                    "use_prev_landmarks": packets.create_bool(True),
                }
            )
            try:
                # Points get better while they are followed: the first frame is looked at a few times before it counts.
                for number, image in enumerate((*video[:1].repeat(_LOOKS_BEFORE, axis=0), *video), -_LOOKS_BEFORE):
                    mesh = self._process(image, (number + _LOOKS_BEFORE + 1) * _MICROSECONDS_PER_FRAME)
                    if mesh is not None and number >= 0:
                        points_FPX[number] = mesh[list(POINTS)] * size_X
            finally:
                self._graph.close()
        return points_FPX

    def _process(self, image: NDArray[np.uint8], microseconds: int) -> Points | None:
        """All points of one frame, x and y relative to its size: float32 [468, 2]; None without a face."""
        runner = self._runner
        self._found.clear()
        packet = runner._packet_creator._create_image_frame_from_pixel_data(
            runner.image_frame.ImageFormat.SRGB, cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), False
        )
        self._graph.add_packet_to_input_stream("image", packet.at(runner.timestamp.Timestamp(microseconds)))
        self._graph.wait_until_idle()
        found = self._found.get(_OUTPUT)
        if found is None or found.is_empty():
            return None
        return parse_landmarks(runner._packet_getter._get_serialized_proto_list(found)[0])


def parse_landmarks(serialised: bytes) -> Points:
    """x and y of a serialised ``mediapipe.NormalizedLandmarkList`` of the mesh: float32 [468, 2].

    Read here, because MediaPipe's own classes for it need protobuf 4.
    """
    records = np.frombuffer(serialised, _POINT)
    assert len(records) == _MESH_POINTS and records["head"].tobytes() == _HEAD * _MESH_POINTS, "not the mesh's points"
    assert (records["tag_y"] == _TAG_Y).all() and (records["tag_z"] == _TAG_Z).all(), "not the mesh's points"
    return np.stack([records["x"], records["y"]], axis=1)


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
