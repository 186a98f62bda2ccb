"""Reader of CTranslate2's ``model.bin``, in NumPy.

Layout (little endian; a string is a u16 length that counts its closing NUL, then the bytes)::

    u32 binary version | string spec name | u32 spec revision
    u32 number of variables, then for each: string name | u8 rank | u32 dims[rank] | u8 dtype | u32 bytes | data
    u32 number of aliases, then for each: string alias | string name

Quantised weights come with a variable ``<name>_scale`` and mean ``weight / scale``: one scale a row for int8, one for
the whole tensor for int16. Source: the model specification of CTranslate2 (OpenNMT), binary versions 4 to 6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_dist.errors import UserError

_VERSIONS = range(4, 7)
_BFLOAT16 = 5
_DTYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


@dataclass(frozen=True)
class CTranslate2Model:
    """The content of a ``model.bin``.

    Attributes:
        spec: name of the model class that wrote it, such as ``WhisperSpec``.
        variables: stored arrays by name, aliases included, neither dequantised nor cast (bfloat16 arrives as float32).
    """

    spec: str
    variables: dict[str, NDArray[Any]]

    def dense(self, name: str) -> NDArray[np.float32]:
        """Return variable `name` dequantised, as float32 in the stored shape.

        Raises:
            UserError: there is no such variable, or an integer weight has no scale.
        """
        if name not in self.variables:
            raise UserError(f"the CTranslate2 model holds no variable {name!r}")
        stored = self.variables[name]
        values = stored.astype(np.float32)
        if stored.dtype not in (np.int8, np.int16):
            return values
        if (scale := self.variables.get(f"{name}_scale")) is None:
            raise UserError(f"the CTranslate2 variable {name!r} is quantised but has no {name}_scale")
        per_row = scale.astype(np.float32).reshape(-1, *([1] * (values.ndim - 1)))  # one row where it is a scalar
        return np.divide(values, per_row, dtype=np.float32)


def read_model(path: Path) -> CTranslate2Model:
    """Read a ``model.bin``.

    Raises:
        UserError: the file is cut short, has bytes left over, or is of another format or version.
    """
    cursor = _Cursor(path.read_bytes(), path)
    if (version := cursor.number("I")) not in _VERSIONS:
        raise UserError(f"{path} has CTranslate2 binary version {version}; versions 4 to 6 can be read")
    spec = cursor.string()
    cursor.number("I")  # spec revision: it only tells CTranslate2 how to upgrade a model in memory
    variables: dict[str, NDArray[Any]] = {}
    for _ in range(cursor.number("I")):
        name = cursor.string()
        shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
        variables[name] = cursor.array(name, shape, dtype_code=cursor.number("B"), size=cursor.number("I"))
    for _ in range(cursor.number("I")):
        alias, name = cursor.string(), cursor.string()
        if name not in variables:
            raise UserError(f"{path}: alias {alias!r} points to {name!r}, which is not in the file")
        variables[alias] = variables[name]
    cursor.expect_end()
    return CTranslate2Model(spec, variables)


class _Cursor:
    """Reads values one after the other from a buffer, and never past its end."""

    def __init__(self, buffer: bytes, path: Path) -> None:
        self._buffer, self._path, self._offset = buffer, path, 0

    def _take(self, size: int) -> bytes:
        piece = self._buffer[self._offset : self._offset + size]
        if len(piece) != size:
            raise UserError(f"{self._path} is cut short at byte {len(self._buffer)}: fetch it again")
        self._offset += size
        return piece

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def string(self) -> str:
        try:
            return self._take(self.number("H")).rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path} is no CTranslate2 model: a name in it is not text") from error

    def array(self, name: str, shape: tuple[int, ...], dtype_code: int, size: int) -> NDArray[Any]:
        data = self._take(size)
        if dtype_code == _BFLOAT16:  # the upper half of a float32
            flat: NDArray[Any] = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype_code in _DTYPES:
            flat = np.frombuffer(data, np.dtype(_DTYPES[dtype_code]).newbyteorder("<"))
        else:
            raise UserError(f"{self._path}: variable {name!r} has the unknown dtype code {dtype_code}")
        if flat.size != int(np.prod(shape, dtype=np.int64)):
            raise UserError(f"{self._path}: variable {name!r} has {flat.size} values for the shape {shape}")
        return flat.reshape(shape)

    def expect_end(self) -> None:
        if self._offset != len(self._buffer):
            raise UserError(f"{self._path} has {len(self._buffer) - self._offset} bytes after its last variable")
