"""What every key of a configuration means: the comments of the YAML files, each found at the key that it is about.

A comment stands behind its key, and goes on below it where it is too long, or stands above its key. The comment at the
top of a file is about the file. Of several files with a key, the comment of the last one that has any counts: it is the
nearest to whatever set the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mome_dist.config.load import files_of
from mome_dist.config.yaml_files import read_yaml
from mome_dist.paths import configs_dir
from mome_dist.text_files import lines_of

Comment = tuple[str, ...]
"""Its lines, without the sign before them."""


@dataclass
class Comments:
    """Comments of a composition.

    Attributes:
        of_key: by key, with its sections before it: ``optimizer.learning_rate``.
        of_section: by the key of a section, the file that chose it and what that says at its top.
        of_all: the same of the files that are about no section: an experiment, a method.
    """

    of_key: dict[str, Comment] = field(default_factory=dict)
    of_section: dict[str, tuple[str, Comment]] = field(default_factory=dict)
    of_all: list[tuple[str, Comment]] = field(default_factory=list)


def comments_of(overrides: Sequence[str]) -> Comments:
    """The comments of what overrides compose; those of keys that are set nowhere are from the files that could.

    Raises:
        HydraException: for overrides that compose nothing (`mome_dist.config.load.load_config` says why).
    """
    found, meanings = Comments(), dict[str, Comment]()
    chosen = files_of(overrides)
    for name, package in [*_all_files(), *chosen]:
        top, keys = read_comments(configs_dir() / f"{name}.yaml")
        inside = {f"{package}.{key}" if package else key: comment for key, comment in keys.items()}
        found.of_key |= inside
        meanings = inside | meanings
        if (name, package) not in chosen or name == "config" or name.endswith("/base"):
            continue
        if package:
            found.of_section[package] = (name, top)
        else:
            found.of_all.append((name, top))
    for path in sorted((configs_dir() / "method").rglob("*.yaml")):  # of sections that only a method fills
        for key, comment in read_comments(path)[1].items():
            found.of_key.setdefault(key, comment)
    for word in overrides:  # what a file says of its own value is not about one of the command line
        key = word.lstrip("+~").partition("=")[0]
        if key in meanings:
            found.of_key[key] = meanings[key]
    return found


def read_comments(path: Path) -> tuple[Comment, dict[str, Comment]]:
    """The comment at the top of a YAML file, and those of its keys."""
    text, node = read_yaml(path)
    lines = text.splitlines()
    places = dict(_keys(node, ""))
    first = min(places.values(), default=(len(lines), 0, 0))[0]
    top = [line.lstrip("#")[1:] for line in lines[:first] if line.startswith("#") and not line.startswith("# @package")]
    return tuple(top), {
        key: comment for key, place in places.items() if (comment := _comment_at(lines, place, place[0] == first))
    }


def _keys(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Keys of a mapping, with the line and column where each begins, and the column where a value in the line ends."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not prefix and key.value == "defaults":
            continue
        start = key.start_mark
        same_line = value.end_mark.line == start.line
        end = value.end_mark.column if same_line else key.end_mark.column
        yield f"{prefix}{key.value}", (start.line, start.column, end)
        if not (isinstance(value, yaml.MappingNode) and value.flow_style):
            yield from _keys(value, f"{prefix}{key.value}.")


def _comment_at(lines: Sequence[str], place: tuple[int, int, int], first: bool) -> Comment:
    number, column, end = place
    _, sign, behind = lines[number][end:].partition("#")
    if sign:
        more = []
        for line in lines[number + 1 :]:
            plain = line.lstrip()
            if not plain.startswith("#") or len(line) - len(plain) <= column:
                break
            more.append(plain[2:])
        return (behind.strip(), *more)
    above: list[str] = []
    for line in reversed(lines[:number] if not first else []):
        if not line.startswith(" " * column + "#"):
            break
        above.insert(0, line.strip()[2:])
    return tuple(above)


def _all_files() -> Iterator[tuple[str, str]]:
    """The files of all groups that stand for a section, those before others that others begin from."""
    root = configs_dir()
    files = [path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml")]
    for file in sorted(files, key=lambda file: (file.name != "base", file)):
        section = file.parts[0] not in ("launcher", "published") and file.parent.name
        if section and "# @package _global_" not in lines_of(root / f"{file}.yaml"):
            yield file.as_posix(), ".".join(file.parts[:-1])
