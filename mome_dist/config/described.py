"""Every key of a run and of the launchers with its default, the values that it takes, and the comment of its YAML file.

The reference of the documentation is made of it. No torch here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mome_dist.config.comments import Written, keys, opening
from mome_dist.config.load import options_of
from mome_dist.config.schema import RunConfig
from mome_dist.paths import configs_dir


@dataclass(frozen=True)
class Described:
    """A key.

    Attributes:
        name: with dots, as a command line has it.
        default: as written in YAML, without an experiment; empty for a section, and for a key of one that is null.
        values: what it takes: a type, or the values that it is restricted to.
        comment: of its YAML file.
    """

    name: str
    default: str
    values: str
    comment: str


def groups() -> dict[str, str]:
    """The groups of a run and the option that ``configs/config.yaml`` has of each, in its order; "null" for none."""
    chosen: dict[str, str] = {}
    for entry in _defaults(configs_dir() / "config.yaml"):
        if isinstance(entry, dict):
            ((group, option),) = entry.items()
            chosen[group] = option or "null"
    return chosen


def options(group: str) -> dict[str, str]:
    """What a group may be set to, and what the file of each says at its top."""
    return {name: opening(configs_dir() / group / f"{name}.yaml") for name in options_of(group)}


def of_run() -> list[Described]:
    """All keys of a run, section by section."""
    written = dict(keys(configs_dir() / "config.yaml"))
    for group, option in groups().items():
        if option != "null":
            written |= {f"{group}.{key}": said for key, said in _of_group(group, option).items()}
    kinds = dict(_kinds(RunConfig, ""))
    sections = list(dict.fromkeys(name.partition(".")[0] for name in kinds))
    ordered = [*(name for name in kinds if name in written), *(name for name in written if name not in kinds)]
    ordered.sort(key=lambda name: sections.index(name.partition(".")[0]))
    described = (Described(key, written[key].value, kinds.get(key, "text"), written[key].comment) for key in ordered)
    return [key for key in described if key.default or key.comment]


def of_launcher(name: str, schema: type) -> list[Described]:
    """All keys of a launcher, ``launcher.`` before each, as ``configs/launcher/NAME.yaml`` has them.

    Args:
        schema: the dataclass of its options.
    """
    kinds = dict(_kinds(schema, ""))
    written = keys(configs_dir() / "launcher" / f"{name}.yaml")
    return [Described(f"launcher.{key}", said.value, kinds[key], said.comment) for key, said in written.items()]


def of_dataclass(schema: type, prefix: str = "") -> list[Described]:
    """The fields of a dataclass, their defaults as YAML has them, and what the ``Attributes`` of its docstring say."""
    said = dict(_attributes(schema.__doc__ or ""))
    found = []
    for name, kind in _kinds(schema, prefix):
        field = next(field for field in dataclasses.fields(schema) if field.name == name.removeprefix(prefix))
        value = field.default_factory() if callable(field.default_factory) else field.default
        found.append(Described(name, _as_yaml(value), kind, said.get(field.name, "")))
    return found


def _of_group(group: str, option: str) -> dict[str, Written]:
    """Keys of a group's option and of what it is based on, values of the option, and keys that only others set."""
    folder = configs_dir() / group
    found: dict[str, Written] = {}
    chain = [*_bases(folder, option), option]
    for name in chain:
        for key, said in keys(folder / f"{name}.yaml").items():
            found[key] = Written(said.value, found[key].comment if key in found else said.comment)
    for entry in _defaults(folder / f"{chain[0]}.yaml"):  # a group inside of this one, such as mome/router
        if isinstance(entry, dict):
            ((inner, inner_option),) = entry.items()
            for other in (inner_option, *sorted(path.stem for path in (folder / inner).glob("*.yaml"))):
                for key, said in keys(folder / inner / f"{other}.yaml").items():
                    only = "" if other == inner_option else f" (`{group}/{inner}={other}`)"
                    found.setdefault(f"{inner}.{key}", Written("" if only else said.value, said.comment + only))
    for name in options_of(group):
        for key, said in keys(folder / f"{name}.yaml").items():
            if key not in found and f"{group}.{key}" in dict(_kinds(RunConfig, "")):
                found[key] = Written("", said.comment)
    return found


def _bases(folder: Path, option: str) -> list[str]:
    names = [entry for entry in _defaults(folder / f"{option}.yaml") if isinstance(entry, str) and entry != "_self_"]
    return [base for name in names for base in (*_bases(folder, name), name)]


def _defaults(path: Path) -> list[Any]:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])


@cache
def _choices(schema: type) -> dict[str, tuple[str, ...]]:
    fields = dataclasses.fields(schema)
    return {field.name: field.metadata["choices"] for field in fields if "choices" in field.metadata}


def _kinds(schema: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Every key of a dataclass and of the sections in it with what it takes, in words."""
    for name, hint in get_type_hints(schema).items():
        section = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        if section is not None:
            yield prefix + name, "section" + (" or null" if section is not hint else "")
            assert isinstance(section, type)
            yield from _kinds(section, f"{prefix}{name}.")
            continue
        listed = ", ".join(_choices(schema).get(name, ()))
        many = "a list of " if get_origin(hint) is list else ""
        yield prefix + name, many + listed if listed else _words(hint)


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is list:
        inner = _words(get_args(hint)[0])
        return f"list of {inner}" + ("" if " or " in inner else "s")
    if get_origin(hint) is dict:
        return "keys and values"
    return _WORDS[hint]


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _attributes(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and descriptions of a docstring's ``Attributes``; a line may name several."""
    names: list[str] = []
    words: list[str] = []
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 8:
            yield from ((name, " ".join(words)) for name in names)
            before, _, after = line.strip().partition(":")
            names, words = before.split(", "), [after.strip()]
        elif line.strip() and indent > 8:
            words.append(line.strip())
    yield from ((name, " ".join(words)) for name in names)
