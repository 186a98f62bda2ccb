"""Files that appear whole or not at all, are on disk when they do, and can be told apart by their hash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome_dist.errors import UserError, no_file
from mome_dist.processes import IDENTITY, is_gone, this_process

if TYPE_CHECKING:
    from torch import Tensor

_HASH_CHUNK = 1 << 20
_NAME_IN_ASIDE = 40  # characters: names of files are limited
_ASIDE = re.compile(rf"\..*\.\w+\.({IDENTITY.pattern})\.aside")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_downloaded(path: Path) -> None:
    """Raise UserError if a checkpoint that others published is not there; commands ask before they import torch."""
    if not path.is_file():
        raise UserError(f"{path} {no_file(path)}; name the checkpoint that was downloaded.")


def check_absent(target: Path, what: str, name: str = "directory") -> None:
    """Raise UserError if something is where ``what`` ("an export") is to be, which ``name`` of a command line says."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists, and {what} replaces nothing: name another {name} or remove it.")


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a hidden directory beside ``path``, on the same file system, to prepare it in; it goes at the end.

    Its name says which process made it, so that `sweep` can tell what a killed process left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(
        tempfile.mkdtemp(prefix=f".{path.name[:_NAME_IN_ASIDE]}.", suffix=f".{this_process()}.aside", dir=path.parent)
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that have ended left in a folder when they were killed (`aside`)."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            found = _ASIDE.fullmatch(path.name)
            if found is not None and is_gone(found[1]):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write; on a clean exit it is on disk and replaces ``path``."""
    with aside(path) as folder:
        # The suffix stays: writers choose a format by it.
        temporary = folder / path.name
        yield temporary
        fsync(temporary)
        temporary.replace(path)


@contextmanager
def published_directory(directory: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it is on disk, complete, as ``directory``.

    On an error nothing is left behind, and what was there stays as it was. Of two that publish at once, the first wins,
    or with ``replace`` the last.

    Args:
        replace: whether it may take the place of an older directory.

    Raises:
        UserError: without ``replace``, if there is something that is not empty.
    """
    sweep(directory.parent)
    with aside(directory) as folder:
        built, old = folder / "new", folder / "old"
        built.mkdir()
        yield built
        finish_tree(built)
        while True:
            try:
                built.rename(directory)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if not replace:
                    raise UserError(
                        f"{directory} has come into being meanwhile; nothing of it was replaced. Name another "
                        "directory, or remove it."
                    ) from error
            shutil.rmtree(old, ignore_errors=True)
            with suppress(FileNotFoundError):  # another process is replacing it, too
                directory.rename(old)
        fsync(directory.parent)


def finish_tree(directory: Path) -> None:
    """Flush a directory that was made with the user's umask to disk, and give every file in it the permissions of that.

    Some writers go through temporary files that only their owner may read, which would spoil what colleagues share.
    """
    mode = directory.stat().st_mode & 0o666
    for path in [*directory.rglob("*"), directory]:
        if path.is_file():
            path.chmod(mode)
        fsync(path)


def write_once(path: Path, text: str) -> str:
    """Write UTF-8 text unless there is such a file; return what is there now. Of several processes one writes."""
    with aside(path) as folder:
        temporary = folder / "new"
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        with suppress(FileExistsError):
            os.link(temporary, path)
    return path.read_text(encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, on disk when this returns, with the permissions of the user's umask.

    Raises:
        OSError: naming the file, where safetensors only says that something went wrong.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner may read
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    path.chmod(mode)
    fsync(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; refuses NaN and infinity, which JSON has no word for."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
