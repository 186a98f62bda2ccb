"""Writing a ``.pt`` file whose tensors are streamed: `torch.save` wants all of them in memory.

Such a file is an uncompressed zip archive: ``data.pkl`` is a pickle in which every tensor's numbers are a reference to
an entry ``data/N``. `torch.load` reads it, memory-mapped too, and ``unzip -t`` finds its checksums right. torch's own
way, `torch.serialization.skip_data` and filling in what it left out, leaves checksums of zeros.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mome_dist.checkpoint.deepspeed.plan import Stored
from mome_dist.checkpoint.pieces import Piece

_ROOT = "archive"
_STORAGE_ALIGNMENT = 64  # bytes, as torch aligns them
_PADDING_FIELD = 0x4246  # of a zip entry; the number that torch uses
_ZIP64_FIELD_SIZE, _HEADER_SIZE = 20, 30


class _Numbers:
    """Stands for a tensor's storage until it is pickled as a reference to an entry."""

    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class _Pickler(pickle.Pickler):
    """Pickles a file's contents, of which tensors are `Stored`; collects these in the order of their entries."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.stored: list[Stored] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return NotImplemented
        numbers = _Numbers(str(len(self.stored)), sum(piece.count for piece in value.pieces))
        self.stored.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (numbers, 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Numbers):
            return "storage", torch.FloatStorage, value.key, "cpu", value.count
        return None


def write_torch_file(path: Path, content: Any, read: Callable[[Piece], Iterator[memoryview]]) -> int:
    """Write ``content``, in which every tensor is a `Stored`.

    Args:
        read: gives the little-endian fp32 bytes of a piece, in order.

    Returns:
        Bytes written.
    """
    assert sys.byteorder == "little", "tensors are written as they are in memory"
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, text in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            archive.writestr(f"{_ROOT}/{name}", text)
        for number, stored in enumerate(pickler.stored):
            entry = zipfile.ZipInfo(f"{_ROOT}/data/{number}")
            header = file.tell() + _HEADER_SIZE + len(entry.filename) + _ZIP64_FIELD_SIZE + 4
            padding = -header % _STORAGE_ALIGNMENT
            entry.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
            with archive.open(entry, "w", force_zip64=True) as target:
                for piece in stored.pieces:
                    for chunk in read(piece):
                        target.write(chunk)
        for name, text in (("version", b"3\n"), (".data/serialization_id", b"0")):
            archive.writestr(f"{_ROOT}/{name}", text)
    return path.stat().st_size
