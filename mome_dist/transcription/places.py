"""Which films a command line names: files, folders, patterns and lists, each with its name in the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from mome_dist.errors import UserError, no_file
from mome_dist.text_files import lines_of

ENDINGS = frozenset({
    "aac", "avi", "flac", "flv", "m4a", "m4v", "mka", "mkv", "mov", "mp3", "mp4", "mpeg", "mpg", "mts", "oga", "ogg",
    "opus", "ts", "wav", "webm", "wma", "wmv",
})  # fmt: skip
"""Endings of files in a folder that are taken for films or recordings; a file that is named itself may have any."""


class Place(NamedTuple):
    """A film, and its name below the output folder, without an ending."""

    film: Path
    name: PurePath


def films_at(places: Sequence[str], listed: Path | None = None) -> list[Place]:
    """Every film that is named, in order, each once.

    Args:
        places: files, folders (with all that is below them) and patterns such as ``films/**/*.mp4``.
        listed: a text file with one of these a line, relative to its folder.

    Raises:
        UserError: nothing is there, or two films would have one name.
    """
    named = list(places)
    if listed is not None:
        named += [str(listed.parent / line.strip()) for line in lines_of(listed) if line.strip()]
    found: dict[Path, Place] = {}
    for place in named:
        for each in _films(place):
            found.setdefault(each.film.resolve(), each)
    if not found:
        raise UserError(f"no film is named{f' in {listed}' if listed else ''}: give files, folders or patterns.")
    names: dict[PurePath, Path] = {}
    for film, name in found.values():
        if name in names:
            raise UserError(
                f"{names[name]} and {film} would be written to one file, {name}: give a folder above both, or rename "
                "one."
            )
        names[name] = film
    return list(found.values())


def _films(place: str) -> Iterator[Place]:
    path = Path(place)
    if path.is_dir():
        inside = sorted(each for each in path.rglob("*") if each.is_file() and _is_film(each))
        if not inside:
            raise UserError(f"{place}: no film in this folder or below it (endings: {', '.join(sorted(ENDINGS))}).")
        yield from (Place(each, each.relative_to(path).with_suffix("")) for each in inside)
    elif path.exists() or not set(place) & set("*?["):
        if not path.is_file():
            raise UserError(f"{place} {no_file(path)}; give a film, a folder of films, or a pattern in quotes.")
        yield Place(path, PurePath(path.stem))
    else:
        below = Path(path.anchor or ".")
        matching = sorted(each for each in below.glob(str(path.relative_to(path.anchor))) if each.is_file())
        if not matching:
            raise UserError(f"{place}: no file matches this pattern.")
        yield from (Place(film, PurePath(film.stem)) for film in matching)


def _is_film(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in ENDINGS
