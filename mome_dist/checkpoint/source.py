"""A checkpoint as a flat row of numbers for each tensor, read from disk in pieces, whatever its size.

Files are read with plain system calls into small buffers: mapped files would count as this process's memory.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mome_dist.checkpoint.format import CONFIG, CheckpointReader, Part, sharing_of
from mome_dist.checkpoint.hashes import StreamedHash
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.errors import UserError

CHUNK = 4 << 20  # bytes that are read at once
_OPEN_FILES = 64  # of a thread
STRUCTURE = ("format", "content", "files", "tensors")  # of an index: what depends on how it is cut into files


def item_size(dtype: str) -> int:
    """Bytes of an element, of a torch type's name without ``torch.``."""
    return int(getattr(torch, dtype).itemsize)


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` to ``stop`` of a tensor, from byte ``offset`` of a file."""

    start: int
    stop: int
    path: Path
    offset: int


class Source:
    """Layout-free tensors in files. Use as a context manager.

    Args:
        facts: of every tensor, by name.
        stretches: where each is; together they make up the whole tensor, in order.
        record: what an index says beside `STRUCTURE`: step, data position, versions and so on.
        config: text of the run's ``config.yaml``; None if the checkpoint does not know it.
        content: the content hash that the checkpoint claims; None if it claims none.
        inline: bytes of small tensors that are in no file of their own.
        hashes: that the checkpoint claims of single tensors (`tensor_hash`).
    """

    def __init__(
        self,
        facts: Mapping[str, TensorFacts],
        stretches: Mapping[str, list[Stretch]],
        record: dict[str, Any],
        config: str | None,
        content: str | None,
        inline: Mapping[str, bytes] | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        self.facts, self.record, self.config, self.content = facts, record, config, content
        self.hashes = hashes or {}
        self._stretches, self._inline = stretches, inline or {}
        self._files = OpenFiles()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def chunks(self, piece: Range) -> Iterator[memoryview]:
        """The bytes of a range, in order; each view holds until the next is asked for."""
        size = item_size(self.facts[piece.tensor].dtype)
        if piece.tensor in self._inline:
            yield memoryview(self._inline[piece.tensor])[piece.start * size : piece.stop * size]
            return
        stretches = self._stretches[piece.tensor]
        buffer = memoryview(bytearray(min(CHUNK, piece.count * size)))
        first = bisect.bisect_right(stretches, piece.start, key=lambda stretch: stretch.start) - 1
        for stretch in stretches[max(first, 0) :]:
            start, stop = max(piece.start, stretch.start), min(piece.stop, stretch.stop)
            if start >= stop:
                break
            position = stretch.offset + (start - stretch.start) * size
            end = position + (stop - start) * size
            while position < end:
                view = buffer[: end - position]
                got = os.preadv(self._files.descriptor(stretch.path), [view], position)
                if not got:
                    raise UserError(f"{stretch.path} is shorter than it says; use an older checkpoint.")
                yield view[:got]
                position += got

    def digests(self, name: str) -> list[str]:
        """The digest of every row of a stacked tensor, or of the whole of another."""
        facts = self.facts[name]
        row = facts.count // facts.shape[0] * item_size(facts.dtype) if facts.stacked else None
        streamed = StreamedHash(row)
        for chunk in self.chunks(Range(name, 0, facts.count)):
            streamed.update(chunk)
        return streamed.finish()


class OpenFiles:
    """Descriptors of the files in use, a limited number of them for each thread: what one thread closes, to make room,
    no other can be reading from."""

    def __init__(self) -> None:
        self._threads: dict[int, OrderedDict[Path, int]] = {}

    def descriptor(self, path: Path) -> int:
        """The descriptor of a file open for reading; it is the calling thread's own, until it asks for other files.

        Raises:
            UserError: if it cannot be opened.
        """
        mine = self._threads.setdefault(threading.get_ident(), OrderedDict())
        if path in mine:
            mine.move_to_end(path)
        else:
            try:
                mine[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}); use an older checkpoint.") from error
            if len(mine) > _OPEN_FILES:
                os.close(mine.popitem(last=False)[1])
        return mine[path]

    def close(self) -> None:
        """Close all, of all threads; none may be reading."""
        for descriptors in self._threads.values():
            while descriptors:
                os.close(descriptors.popitem()[1])


def open_canonical(directory: Path) -> Source:
    """A layout-free checkpoint.

    Raises:
        UserError: for a missing or damaged file, by name.
    """
    with CheckpointReader(directory) as reader:
        index = reader.index
        reader.verify([CONFIG])
    headers = {name: _header(directory / name) for name in index["files"] if name != CONFIG}
    facts: dict[str, TensorFacts] = {}
    stretches: dict[str, list[Stretch]] = {}
    for name, entry in index["tensors"].items():
        parts = [Part(**part) for part in entry["parts"]]
        shape = tuple(entry["shape"])
        facts[name] = TensorFacts(shape, entry["dtype"], sharing_of(name, entry))
        row = facts[name].count // shape[0] if facts[name].stacked else facts[name].count
        stretches[name] = []
        for part in sorted(parts, key=lambda part: part.start or 0):
            path = directory / part.file
            first, count = (part.start or 0) * row, row if part.rows is None else part.rows * row
            data, header = headers[part.file]
            begin, end = header.get(name, {}).get("data_offsets", (0, 0))
            if end - begin != count * item_size(entry["dtype"]):
                raise UserError(f"{path} does not hold {name!r} as the index says; damaged, use an older checkpoint.")
            stretches[name].append(Stretch(first, first + count, path, data + begin))
    record = {key: value for key, value in index.items() if key not in STRUCTURE}
    config = (directory / CONFIG).read_text(encoding="utf-8")
    hashes = {name: entry["sha256"] for name, entry in index["tensors"].items()}
    return Source(facts, stretches, record, config, index["content"], hashes=hashes)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and what its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return 8 + length, json.loads(file.read(min(length, path.stat().st_size)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); use an older checkpoint.") from error
