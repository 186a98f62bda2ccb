"""A checkpoint as a row of numbers for each tensor, read from disk in pieces, whatever its size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mome_dist.checkpoint.format import CONFIG, CheckpointReader, Part
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.errors import UserError

CHUNK = 8 << 20  # bytes that are read at once


def item_size(dtype: str) -> int:
    """Bytes of an element, of a torch type's name without ``torch.``."""
    return int(getattr(torch, dtype).itemsize)


@dataclass(frozen=True)
class _Stretch:
    """Elements ``start`` to ``stop`` of a tensor, from byte ``offset`` of an open file."""

    start: int
    stop: int
    descriptor: int
    path: Path
    offset: int


class CanonicalSource:
    """The tensors of a layout-free checkpoint. Use as a context manager.

    Reads with plain system calls into one buffer: mapped files would count as this process's memory.

    Attributes:
        facts: of every tensor, by name.
        index: of the checkpoint.
        config: text of its ``config.yaml``.

    Raises:
        UserError: for a missing or damaged file, by name.
    """

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        with CheckpointReader(directory) as reader:
            self.index: dict[str, Any] = reader.index
        self.directory, self.config = directory, (directory / CONFIG).read_text(encoding="utf-8")
        self.facts: dict[str, TensorFacts] = {}
        self._stretches: dict[str, list[_Stretch]] = {}
        self._buffer = bytearray(CHUNK)
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> CanonicalSource:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def chunks(self, piece: Range) -> Iterator[memoryview]:
        """The bytes of a range, in order; each view holds until the next is asked for."""
        size = item_size(self.facts[piece.tensor].dtype)
        for stretch in self._stretches[piece.tensor]:
            first, last = max(piece.start, stretch.start), min(piece.stop, stretch.stop)
            position = stretch.offset + (first - stretch.start) * size
            left = (last - first) * size
            while left > 0:
                view = memoryview(self._buffer)[: min(left, CHUNK)]
                got = os.preadv(stretch.descriptor, [view], position)
                if not got:
                    raise UserError(f"{stretch.path} is shorter than it was; use an older checkpoint.")
                yield view[:got]
                position, left = position + got, left - got

    def _open(self) -> None:
        headers: dict[str, tuple[int, int, dict[str, Any]]] = {}
        for name, entry in self.index["tensors"].items():
            parts = [Part(**part) for part in entry["parts"]]
            shape = tuple(entry["shape"])
            facts = TensorFacts(shape, entry["dtype"], any(part.start is not None for part in parts))
            row = facts.count // shape[0] if facts.stacked else facts.count
            stretches = []
            for part in parts:
                if part.file not in headers:
                    headers[part.file] = self._header(self.directory / part.file)
                descriptor, data, header = headers[part.file]
                first = (part.start or 0) * row
                count = facts.count if part.rows is None else part.rows * row
                begin, end = header.get(name, {}).get("data_offsets", (0, 0))
                if end - begin != count * item_size(facts.dtype):
                    raise UserError(f"{self.directory / part.file} does not hold {name!r} as {entry['shape']}; damaged.")
                stretches.append(_Stretch(first, first + count, descriptor, self.directory / part.file, data + begin))
            stretches.sort(key=lambda stretch: stretch.start)
            ends = [stretch.stop for stretch in stretches]
            if [stretch.start for stretch in stretches] != [0, *ends[:-1]] or ends[-1] != facts.count:
                raise UserError(f"{self.directory}: the parts of {name!r} do not make up the tensor; damaged.")
            self.facts[name], self._stretches[name] = facts, stretches

    def _header(self, path: Path) -> tuple[int, int, dict[str, Any]]:
        """An open file, where its data begin, and what its header says."""
        try:
            file = self._stack.enter_context(path.open("rb", buffering=0))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(os.pread(file.fileno(), min(length, path.stat().st_size), 8))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); use an older checkpoint.") from error
        return file.fileno(), 8 + length, header
