"""What command lines share: mistakes of the user end in one line on stderr, not in a traceback; and common options."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from mome_dist.errors import RankLostError, UserError
from mome_dist.exit_codes import INTERRUPTED, RANK_LOST, USER_ERROR

P = ParamSpec("P")


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a command's ``main`` so that it returns an exit code (None counts as 0).

    A `UserError` becomes ``error: <message>`` on stderr and code 2. Ranks above 0 of a distributed run put their number
    before it: a mistake that only one rank can see must not be lost. A `RankLostError` is told the same way and becomes
    code 76, Ctrl-C becomes 130. Any other exception is a bug and keeps its traceback. Use it as
    ``sys.exit(main_guard(main)())``, or as a decorator.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (UserError, RankLostError) as error:
            rank = os.environ.get("RANK", "0")
            prefix = "" if rank == "0" else f"[rank {rank}] "
            sys.stdout.flush()
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR if isinstance(error, UserError) else RANK_LOST
        except KeyboardInterrupt:
            return INTERRUPTED

    return guarded


_FROZEN = ("llm", "audio_encoder", "video_encoder")


def add_frozen_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--llm``, ``--audio-encoder`` and ``--video-encoder`` to a command that loads a trained model."""
    for section in _FROZEN:
        option, what = f"--{section.replace('_', '-')}", section.replace("_", " ").replace("llm", "LLM")
        parser.add_argument(option, type=Path, metavar="DIR", help=f"the frozen {what}, if it is elsewhere now")


def frozen_of(options: argparse.Namespace) -> dict[str, Path]:
    """The directories that those options name, by section of the configuration."""
    return {section: place for section in _FROZEN if (place := getattr(options, section)) is not None}
