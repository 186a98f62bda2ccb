"""``mome-dist COMMAND ...``: finds the command, imports its module, and hands over what follows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import groupby

import mome_dist
from mome_dist.cli import main_guard
from mome_dist.commands.registry import COMMANDS, Command, family_of, find_command, main_of

_HELP = ("-h", "--help")
_INTRODUCTION = """usage: mome-dist COMMAND ...

Distributed training of MoME (Mixture of Matryoshka Experts) for audio-visual speech recognition.

    mome-dist launch --nproc 2 train experiment=quickstart
    mome-dist evaluate runs/quickstart
    mome-dist transcribe runs/quickstart CLIP.mp4 --audio-rate 4 --video-rate 2
"""
_EPILOGUE = """
mome-dist COMMAND --help has examples and all arguments, mome-dist --version the version, and mome-dist doctor says what
works here. A run, one of its checkpoints or an export is the first argument; key=value arguments follow.
"""


def overview(commands: Sequence[Command] = COMMANDS) -> str:
    """Commands in their groups, one line each."""
    width = max(len(command.name) for command in commands) + 2
    lines = []
    for group, members in groupby(commands, key=lambda command: command.group):
        lines += ["", group, *(f"  {command.name:<{width}}{command.what}" for command in members)]
    return "\n".join(lines)


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        from mome_dist.commands.completion import answer

        answer()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in _HELP:
        print(_INTRODUCTION + overview() + "\n" + _EPILOGUE, end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"mome_dist {mome_dist.__version__}")
        return 0
    if family_of(words[0]) and (len(words) == 1 or words[1] in _HELP):
        print(f"usage: mome-dist {words[0]} COMMAND ...\n{overview(family_of(words[0]))}")
        return 0 if len(words) > 1 else 2
    command, rest = find_command(words)
    return main_of(command)([*command.first, *rest])
