"""What the system says when a place cannot be written to or read, as one line that a user can act on.

Which errors these are is decided by their number. All others are bugs, or faults that another start may not meet (a
file server that is away), and keep their traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

_RIGHTS = "give this user the right to it, or name another place"
_NOT_THERE = "make it, or name another place"
_FULL = "make room there, or name another place"
_FIXES: Mapping[int, str] = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another place",
    errno.ENOENT: _NOT_THERE,
    errno.ENOTDIR: "a file is where a directory should be: remove it, or name another place",
    errno.EISDIR: "a directory is where a file should be: remove it, or name another place",
    errno.EEXIST: "remove it, or name another place",
    errno.ENOTEMPTY: "remove it, or name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle: mend them, or name another place",
    errno.EMFILE: "raise the number of files that a process may open (ulimit -n)",
    errno.ENFILE: "this machine has too many open files: end other programs",
}
_FULL_BYTES = 1 << 20  # less room than this is none

_places: dict[str, Path] = {}


def note_places(places: Mapping[str, str]) -> None:
    """Remember which keys of a configuration name which paths, so that an error about a path can name its key."""
    _places.update({key: Path(path) for key, path in places.items()})


def explain(error: OSError) -> str | None:
    """What is wrong, where, where that place was named, and the fix; None for an error that is no user's.

    A full disk is told without a path by the system itself; then the places that have no room are named.
    """
    fix = _FIXES.get(error.errno or 0)
    if fix is None:
        return None
    if not isinstance(error.filename, str | bytes | os.PathLike):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = [f"{origin} ({path})" for origin, path in _origins() if _room(path) < _FULL_BYTES]
            return f"{error.strerror}: {' and '.join(full) or 'where this command writes'}; {fix}."
        if error.errno == errno.ENOENT and "temporary directory" in str(error):
            return f"there is no directory for temporary files: {error.strerror}; set TMPDIR to one with room."
        return f"{error.strerror}; {fix}." if error.errno in (errno.EMFILE, errno.ENFILE) else None
    path = Path(os.fsdecode(error.filename))
    if path.is_absolute() and path.is_relative_to(Path(__file__).parent):
        return None  # a file of our own: a bug, or a broken installation
    origin = _origin_of(path)
    return f"{path}: {error.strerror}{f' ({origin})' if origin else ''}; {fix}."


def _origin_of(path: Path) -> str | None:
    """What named a place: the one that goes deepest of those that hold the path, or lie below it."""
    path = path.absolute()
    found = [
        (len(place.parts), origin)
        for origin, place in _origins()
        if path.is_relative_to(place) or place.is_relative_to(path)
    ]
    return max(found, default=(0, None), key=lambda entry: entry[0])[1]


def _origins() -> Iterator[tuple[str, Path]]:
    """All places that somebody named, with what they were named by: the most telling first."""
    words = sys.argv[1:]
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        before = words[number - 1] if number else ""
        if equals and value:
            yield name, Path(value).absolute()
        elif before.startswith("--") and "=" not in before:
            yield before, Path(word).absolute()
        elif not word.startswith("-"):
            yield "named on the command line", Path(word).absolute()
    for key, path in _places.items():
        yield key, path.absolute()
    for variable in ("MOME_DIST_CACHE", "TMPDIR", "HOME"):
        if place := os.environ.get(variable):
            yield variable, Path(place).absolute()
    if "TMPDIR" not in os.environ:
        yield "TMPDIR, which is not set", Path(tempfile.gettempdir())


def _room(path: Path) -> int:
    """Bytes that this user may write at a place, or where it would come into being."""
    while not path.exists() and path != path.parent:
        path = path.parent
    told = os.statvfs(path)
    return told.f_bavail * told.f_frsize
