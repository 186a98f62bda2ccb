"""Every key of a run and of the launchers with its default, the values that it takes, and the comment of its YAML file.

The reference of the documentation is made of it. No torch here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose
from omegaconf import OmegaConf

from mome_dist.config.comments import comments_of, read_comments
from mome_dist.config.load import hydra_on_configs, options_of
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


def choices() -> dict[str, str]:
    """The groups of a run and the option that ``configs/config.yaml`` has of each, in its order; "null" for none."""
    chosen = yaml.safe_load((configs_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option or "null" for entry in chosen if isinstance(entry, dict) for group, option in entry.items()}


def options(group: str) -> dict[str, str]:
    """What a group may be set to, and what the file of each says at its top, up to a command, which is indented."""
    said = {}
    for name in options_of(group):
        lines, _ = read_comments(configs_dir() / group / f"{name}.yaml")
        until = next((number for number, line in enumerate(lines) if line.startswith(" ")), len(lines))
        said[name] = " ".join(lines[:until]).removesuffix(":")
    return said


def of_run() -> list[Described]:
    """All keys of a run, section by section."""
    with hydra_on_configs():
        values = dict(_flat(OmegaConf.to_container(compose("config")), ""))  # ${cache:...} stays as it is written
    comments = {key: " ".join(map(str.strip, lines)) for key, lines in comments_of([]).of_key.items()}
    kinds = dict(_kinds(RunConfig, ""))
    sections = list(dict.fromkeys(name.partition(".")[0] for name in kinds))
    names = [*kinds, *(name for name in (*values, *comments) if name not in kinds and name.partition(".")[0] in kinds)]
    described = (
        Described(
            name,
            _as_yaml(values[name]) if name in values else "",
            kinds.get(name, "text"),
            comments.get(name, ""),
        )
        for name in sorted(dict.fromkeys(names), key=lambda name: sections.index(name.partition(".")[0]))
    )
    return [key for key in described if key.default or key.comment]


def of_launcher(name: str, schema: type) -> list[Described]:
    """All keys of a launcher, ``launcher.`` before each, as its file in ``configs/launcher`` has them.

    Args:
        schema: the dataclass of its options.
    """
    path = configs_dir() / "launcher" / f"{name}.yaml"
    values = dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")), ""))
    _, comments = read_comments(path)
    return [
        Described(
            f"launcher.{key}",
            _as_yaml(values[key]) if key in values else "",
            kind,
            " ".join(map(str.strip, comments.get(key, ()))),
        )
        for key, kind in _kinds(schema, "")
    ]


def of_dataclass(schema: type) -> list[Described]:
    """The fields of a dataclass, their defaults as YAML has them, and what the ``Attributes`` of its docstring say."""
    said = dict(_attributes(schema.__doc__ or ""))
    fields = {field.name: field for field in dataclasses.fields(schema)}
    found = []
    for name, kind in _kinds(schema, ""):
        field = fields[name]
        value = field.default_factory() if callable(field.default_factory) else field.default
        found.append(Described(name, _as_yaml(value), kind, said.get(name, "")))
    return found


def _flat(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys of nested mappings with dots between them; a mapping itself is no value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _restricted(schema: type) -> dict[str, tuple[str, ...]]:
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
        listed = ", ".join(_restricted(schema).get(name, ()))
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
    written = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return written.removesuffix("...\n").strip()


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
