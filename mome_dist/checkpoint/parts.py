"""Writing the parts of a layout-free checkpoint as a stream: header first, then every tensor's bytes as they come.

`safetensors.torch.save_file` wants all tensors in memory, and its caller hashes the file afterwards; here a part is as
large as the disk allows, and is read, hashed and written in one pass.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mome_dist.checkpoint.format import Part, described_sharing
from mome_dist.checkpoint.hashes import StreamedHash
from mome_dist.checkpoint.pieces import Range, TensorFacts
from mome_dist.checkpoint.source import Source, item_size
from mome_dist.parallel.layout import Layout

# Names of types in a safetensors header.
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int64": "I64", "bool": "BOOL"}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Rows:
    """What a rank writes of a tensor: rows ``start`` to ``stop`` along its first dimension, or all of it if None."""

    name: str
    start: int | None = None
    stop: int | None = None


def parts_of(facts: Mapping[str, TensorFacts], layout: Layout, layers: int) -> Iterator[tuple[int, list[Rows]]]:
    """What each rank of a layout writes (`mome_dist.checkpoint.save`), for ranks that write anything.

    Args:
        facts: of all tensors.
        layers: of the model.

    Slices of tensor-parallel ranks are put together in the first of them: a checkpoint has whole tensors.
    """
    ranks: dict[int, list[Rows]] = {}
    stage_of = {number: pp for pp in range(layout.pp) for number in layout.layers_of(pp, layers)}
    for name, tensor in facts.items():
        if match := re.match(r"rng/(\d+)/", name):
            # Of a rank that the layout does not have, if it has fewer.
            rank = int(match[1]) if int(match[1]) < layout.world_size else 0
            ranks.setdefault(rank, []).append(Rows(name))
            continue
        layer = None if tensor.sharing is None else tensor.sharing.layer
        first = (0 if layer is None else stage_of[layer]) * layout.tp * layout.dp
        if not tensor.stacked:
            ranks.setdefault(first, []).append(Rows(name))
            continue
        held = tensor.shape[0] // layout.ep
        for ep in range(layout.ep):
            ranks.setdefault(first + ep * layout.tp, []).append(Rows(name, ep * held, (ep + 1) * held))
    yield from sorted(ranks.items())


def write_part(
    path: Path, rows: list[Rows], source: Source, advance: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write a part.

    Args:
        advance: told the bytes written now and then.

    Returns:
        Size and SHA-256 of the file, and the description of each tensor as in `format.describe_part`.
    """
    rows = sorted(rows, key=lambda piece: (-item_size(source.facts[piece.name].dtype), piece.name))
    header, described, file_hash = _header(rows, source.facts), {}, hashlib.sha256()
    # While a thread of each hashes a piece, it is written.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(2) as hashing:
        _write_all(file, memoryview(header))
        file_hash.update(header)
        for piece in rows:
            tensor = source.facts[piece.name]
            size = item_size(tensor.dtype)
            count = tensor.count // tensor.shape[0] if piece.start is not None else tensor.count
            first, last = (0, 1) if piece.start is None or piece.stop is None else (piece.start, piece.stop)
            tensor_hash = StreamedHash(None if piece.start is None else count * size)
            for chunk in source.chunks(Range(piece.name, first * count, last * count)):
                hashes = [hashing.submit(update, chunk) for update in (file_hash.update, tensor_hash.update)]
                _write_all(file, chunk)
                for update in hashes:
                    update.result()
                advance(len(chunk))
            part = Part(path.name, piece.start, None if piece.start is None else last - first)
            described[piece.name] = {
                "shape": _shape(piece, tensor),
                "dtype": tensor.dtype,
                "digests": tensor_hash.finish(),
                **described_sharing(tensor.sharing),
                "part": asdict(part),
            }
    return {"bytes": path.stat().st_size, "sha256": file_hash.hexdigest()}, described


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:  # a system call may write less than it is given
        data = data[file.write(data) :]


def _shape(piece: Rows, tensor: TensorFacts) -> list[int]:
    whole = list(tensor.shape)
    return whole if piece.start is None or piece.stop is None else [piece.stop - piece.start, *whole[1:]]


def _header(rows: list[Rows], facts: Mapping[str, TensorFacts]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for piece in rows:
        tensor = facts[piece.name]
        shape = _shape(piece, tensor)
        end = offset + TensorFacts(tuple(shape), tensor.dtype).count * item_size(tensor.dtype)
        entries[piece.name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
