"""Text that people and other programs wrote. Here alone it is decided what a line is and what is no text.

UTF-8 with or without a byte order mark. Lines end with ``\\n``, ``\\r\\n`` or ``\\r`` and nothing else: U+2028, U+0085,
form feeds and the like are part of a text, as editors and JSON have it. ``.gz`` is read as what it holds.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mome_dist.errors import UserError

_LONGEST_LINE = 1 << 24  # characters; a small .gz may hold a line that fills the memory

# Bytes that are not UTF-8 are read as lone surrogates, which UTF-8 has no bytes for: so the line is known, not only the
# place in some buffer.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_UTF_16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file without their ends, one after the other; a file of any length takes little memory.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8, holds NUL or is too long; the message names which.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                yield _checked(f"{path}:{number}", line.removesuffix("\n"))
    except (OSError, EOFError, zlib.error) as error:
        after = f" after line {number}" if number else ""
        raise UserError(f"{path}: cannot be read{after} ({getattr(error, 'strerror', None) or error})") from error


def _checked(where: str, line: str) -> str:
    if len(line) > _LONGEST_LINE:
        raise UserError(f"{where}: a line of more than {_LONGEST_LINE} characters is no text")
    if bad := _NO_TEXT.search(line):
        place = f"{where}: column {bad.start() + 1}"
        if bad[0] == "\0" or line.startswith(_UTF_16_MARKS):
            raise UserError(f"{place}: UTF-16, or no text at all; save the file as UTF-8")
        raise UserError(f"{place}: byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8; save the file as UTF-8")
    return line


def split_lines(text: str) -> list[str]:
    """Lines of a text in memory, by the same ends."""
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError as `lines_of` and `parse_json` do."""
    return parse_json("\n".join(lines_of(path)), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is not JSON, has a key twice, or a string that is no text; ``where`` begins the message.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"{where}: key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
        if r"\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    return value
