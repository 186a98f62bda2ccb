"""Files that appear whole or not at all, are on disk when they do, and can be told apart by their hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HASH_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def let_all_read(path: Path) -> None:
    """Open a file to other users, who may share the folder: safetensors writes it for its owner alone."""
    path.chmod(0o644)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (made if need be); the kernel frees it however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write; on a clean exit it is on disk and replaces ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        # The suffix stays: writers choose a format by it.
        temporary = Path(aside) / path.name
        yield temporary
        fsync(temporary)
        temporary.replace(path)


@contextmanager
def published_directory(directory: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it is on disk, complete, as ``directory``.

    On an error nothing is left behind, and what was there stays as it was.

    Args:
        replace: whether it may take the place of an older directory; otherwise an older one that is not empty is an
            OSError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    aside.chmod(0o755)
    try:
        built = aside / "new"
        built.mkdir()
        yield built
        for path in [*built.rglob("*"), built]:
            fsync(path)
        if replace and directory.exists():
            directory.rename(aside / "old")
        built.rename(directory)
        fsync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; refuses NaN and infinity, which JSON has no word for."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
