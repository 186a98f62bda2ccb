"""What makes a shell complete commands, options, experiments, methods and other keys of mome-dist.

    eval "$(mome-dist completion bash)"      in ~/.bashrc
    eval "$(mome-dist completion zsh)"       in ~/.zshrc, after compinit

The shell then asks this program at every press of the key, so that new files in configs/ are known at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence

import argcomplete

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.commands.registry import BY_NAME, COMMANDS, Command, family_of

Completer = Callable[..., Iterable[str]]


def command_line() -> Parser:
    """Its argument."""
    parser = command_parser("completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shell's code."""
    options = command_line().parse_args(arguments)
    print(argcomplete.shellcode(["mome-dist"], shell=options.shell))


def answer() -> None:
    """Tell the shell that asks how the line of ``COMP_LINE`` may go on, and end this process."""
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    words = argcomplete.split_line(line, point)[3]
    parser, skipped = line_after(words[1:])
    os.environ["_ARGCOMPLETE"] = str(1 + skipped)  # words that argcomplete takes for the program's name
    argcomplete.autocomplete(parser)


def line_after(words: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """What reads the rest of a line that begins with these words, and how many of them it does not see."""
    if not words:
        return _choice({command.name.partition(" ")[0] for command in COMMANDS}), 0
    if words[0] == "launch":
        return _launch_line(words)
    if family_of(words[0]) and len(words) == 1:
        return _choice({command.name.partition(" ")[2] for command in family_of(words[0])}), 1
    command = BY_NAME.get(" ".join(words[:2])) or BY_NAME.get(words[0])
    if command is None:
        return argparse.ArgumentParser(add_help=False), len(words)
    return _command_line(command), command.name.count(" ") + 1 - len(command.first)


def _launch_line(words: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    from mome_dist.commands import launch

    start = 2 if len(words) > 1 and words[1] in launch.LAUNCHERS else 1
    launcher = words[1] if start == 2 else "local"
    own, rest = launch.command_line(launcher).divide(words[start:], lambda word: "=" in word)
    if rest:
        parser, skipped = line_after(rest)
        return parser, start + len(own) + skipped
    parser = launch.command_line(launcher)
    names = {command.name.partition(" ")[0] for command in COMMANDS if command.ranks}
    _choose(parser, names | (set(launch.LAUNCHERS) if start == 1 and not own else set()))
    return parser, start


def _choice(names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    _choose(parser, names)
    return parser


def _choose(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for action in parser._actions:
        if action.dest == "overrides":
            _complete(action, lambda **_: sorted(names))
            return
    _complete(parser.add_argument("command", nargs="*"), lambda **_: sorted(names))


def _command_line(command: Command) -> argparse.ArgumentParser:
    """The arguments of a command, with what may be written for them."""
    module = importlib.import_module(command.module)
    parser = module.command_line() if hasattr(module, "command_line") else _keys_only(command.name)
    for action in parser._actions:
        if action.dest in ("overrides", "words"):
            _complete(action, overrides_like)
        elif command.name == "fetch" and action.dest == "names":
            from mome_dist.assets import ASSETS

            _complete(action, lambda **_: list(ASSETS))
    return parser


def _complete(action: argparse.Action, completer: Completer) -> None:
    """What argcomplete asks for words of an argument."""
    action.completer = completer  # type: ignore[attr-defined]


def _keys_only(name: str) -> argparse.ArgumentParser:
    """The command line of a command that takes no options but keys."""
    parser = argparse.ArgumentParser(prog=f"mome-dist {name}")
    if name == "train":
        parser.add_argument("overrides", nargs="*")
        return parser
    parser.add_argument("place")
    if name == "evaluate":
        _complete(parser.add_argument("keys", nargs="*"), evaluation_keys)
    return parser


def overrides_like(prefix: str, **_: object) -> list[str]:
    """Groups and keys that begin like this, or the files of a group whose name it has."""
    from mome_dist.config.load import all_keys, groups, options_of

    key, given, _value = prefix.partition("=")
    names = groups()
    if given:
        return [f"{key}={option}" for option in options_of(key)] if key in names else []
    return [f"{name}=" for name in dict.fromkeys([*names, *all_keys()]) if name.startswith(prefix)]


def evaluation_keys(prefix: str, **_: object) -> list[str]:
    """Keys of an evaluation."""
    from dataclasses import fields

    from mome_dist.evaluation.request import EvaluationRequest

    return [f"{each.name}=" for each in fields(EvaluationRequest) if each.name.startswith(prefix)]


if __name__ == "__main__":
    sys.exit(main())
