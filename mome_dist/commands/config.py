"""The configuration of a run, as it would be trained, with what every key means.

    mome-dist config show experiment=lrs3
    mome-dist config show experiment=tiny method=omni_avsr/st llm.precision=fp32 > mine.yaml
    mome-dist config show runs/quickstart                    of a run, a checkpoint or an export
    mome-dist config keys learning_rate                      keys whose name or meaning has a word in it
    mome-dist config keys 'llm.*' experiment=lrs3

What is printed is YAML, and all of it: groups, experiment, method and the arguments that follow are composed, and the
comment of a key is that of the file nearest to what set it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.config.comments import Comment, Comments, comments_of
from mome_dist.config.load import all_keys, load_config, load_saved_config
from mome_dist.config.models import config_of_trained
from mome_dist.config.schema import RunConfig
from mome_dist.errors import UserError
from mome_dist.trained import find_trained, place_of

_COLUMN = 35  # of comments, as in the files
_PLAIN = re.compile(r"[\w/.<][\w ./<>@+:-]*")


def command_line() -> Parser:
    """Its arguments."""
    parser = command_parser("config", __doc__)
    parser.add_argument("what", choices=("show", "keys"), help="the whole configuration, or some keys of it")
    parser.add_argument("words", nargs="*", metavar="PLACE | PATTERN | key=value", help="as the examples have it")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the configuration, or keys of it."""
    options = command_line().parse_args(arguments)
    words, named = list(options.words), []
    while words and ("=" not in words[0] or words[0].startswith(("run=", "checkpoint="))):
        named.append(words.pop(0))
    if len(named) > 1:
        raise UserError(f"{named[1]!r} is not of the form key=value, such as experiment=tiny.")
    if options.what == "keys":
        print("\n".join(matching(named[0] if named else "*", words)))
        return
    if named and words:
        raise UserError(f"{named[0]} has its configuration already: leave {words[0]} out, or {named[0]}.")
    if named:
        print(shown(_config_at(place_of(named[0]) or ""), Comments(comments_of([]).of_key)), end="")
        return
    config = load_config(words)
    print(f"# mome-dist config show {' '.join(words)}".rstrip())
    print(shown(config, comments_of(words)), end="")


def _config_at(place: str) -> RunConfig:
    """The configuration of something trained, or of a run that has not saved yet."""
    own = Path(place) / "config.yaml"
    return load_saved_config(own) if own.is_file() else config_of_trained(find_trained(place))


def shown(config: RunConfig, comments: Comments) -> str:
    """A configuration as YAML with comments, which `mome_dist.config.load.load_saved_config` reads again."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    lines: list[str] = []
    lines += [f"# {_file(name, text)}" for name, text in comments.of_all]
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append("")
            if key in comments.of_section:
                lines.append(f"# {_file(*comments.of_section[str(key)])}")
        lines += _lines(str(key), value, "", comments)
    return "\n".join(lines) + "\n"


def _file(name: str, text: Comment) -> str:
    """A file, and the first line of what it says at its top."""
    return f"configs/{name}.yaml{': ' + text[0] if text else ''}"


def matching(pattern: str, overrides: Sequence[str]) -> list[str]:
    """Keys whose name matches a pattern, or whose name or comment contains it, each with value and comment.

    Raises:
        UserError: none does, or the overrides are wrong.
    """
    config, comments = load_config(overrides), comments_of(overrides).of_key
    values = dict(_flat(dataclasses.asdict(config), ""))
    lines = []
    for key in dict.fromkeys([*values, *all_keys()]):
        text = " ".join(comments.get(key, ()))
        named = fnmatch.fnmatchcase(key, pattern) or pattern.lower() in key or pattern.lower() in text.lower()
        if named and not any(other.startswith(f"{key}.") for other in values):
            written = f"{key}: {_written(values[key])}" if key in values else f"{key}: unset"
            lines += _commented(written, comments.get(key, ()))
    if not lines:
        raise UserError(f"no key matches {pattern!r}; mome-dist config keys lists all.")
    return lines


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(key: str, value: Any, prefix: str, comments: Comments) -> Iterator[str]:
    path = f"{prefix}{key}"
    indent = "  " * path.count(".")
    comment = comments.of_key.get(path, ())
    if isinstance(value, dict) and value:
        yield from _commented(f"{indent}{key}:", comment)
        for name, inner in value.items():
            yield from _lines(str(name), inner, f"{path}.", comments)
    else:
        yield from _commented(f"{indent}{key}: {_written(value)}", comment)


def _commented(text: str, comment: Comment) -> list[str]:
    """A line with its comment, and the lines that the comment goes on in."""
    if not comment:
        return [text]
    return [f"{text:<{_COLUMN - 1}} # {comment[0]}", *(f"{'':<{_COLUMN}}# {line}" for line in comment[1:])]


def _written(value: Any) -> str:
    """A value in one line of YAML that OmegaConf reads as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_written(key)}: {_written(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    return str(OmegaConf.to_yaml({"x": value})).removeprefix("x: ").strip()


def _is_plain(text: str) -> bool:
    """Whether a string is the same string in YAML without quotes, also in a list."""
    plain = _PLAIN.fullmatch(text) is not None and ": " not in text and not text.endswith((" ", ":"))
    return plain and OmegaConf.create(f"x: {text}").x == text


if __name__ == "__main__":
    sys.exit(main())
