"""What command lines share: mistakes of the user and the system's refusals end in one line on stderr, not in a
traceback; common options.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, ParamSpec

from mome_dist.errors import RankLostError, UserError
from mome_dist.exit_codes import INTERRUPTED, RANK_LOST, USER_ERROR
from mome_dist.extras import missing_extra
from mome_dist.hints import did_you_mean, near
from mome_dist.processes import ensure_user_name
from mome_dist.system_errors import explain

P = ParamSpec("P")


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a command's ``main`` so that it returns an exit code (None counts as 0).

    A `UserError` becomes ``error: <message>`` on stderr and code 2, and so does what the system refuses, such as a full
    disk (`mome_dist.system_errors`), and a package that is not installed and that an extra brings
    (`mome_dist.extras`). Ranks above 0 of a distributed run put their number before it: a mistake that only one rank
    can see must not be lost. A `RankLostError` is told the same way and becomes code 76, Ctrl-C becomes 130. Any other
    exception is a bug and keeps its traceback. SIGTERM ends a command with code 143 once it has cleaned up.
    Use it as ``sys.exit(main_guard(main)())``, or as a decorator.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        ensure_user_name()
        with _cleaning_up_on_sigterm():
            try:
                return main(*args, **kwargs) or 0
            except (UserError, RankLostError) as error:
                _tell(str(error))
                return USER_ERROR if isinstance(error, UserError) else RANK_LOST
            except ModuleNotFoundError as error:
                line = missing_extra(error)
                if line is None:
                    raise
                _tell(line)
                return USER_ERROR
            except OSError as error:
                line = explain(error)
                if line is None:
                    raise
                _tell(line)
                return USER_ERROR
            except KeyboardInterrupt:
                return INTERRUPTED

    return guarded


def _tell(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    with suppress(OSError):  # standard output may be what is full
        sys.stdout.flush()
    print(f"{prefix}error: {message}", file=sys.stderr, flush=True)


@contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C, so that temporary files go.

    Not on a rank: it has none that another rank could miss, and shall not wait for a collective before it ends.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told as all others: one line, with the options that look like a wrong one."""

    def __init__(self, description: str | None = None, **kwargs: Any) -> None:
        if not issubclass(kwargs.get("formatter_class", argparse.HelpFormatter), argparse.RawDescriptionHelpFormatter):
            description = (description or "").partition("\n")[0]  # lines that follow would become one paragraph
        super().__init__(description=description, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise UserError with what argparse found, and what was meant."""
        found, _, words = message.partition("unrecognized arguments: ")
        if words and not found:
            word = words.split()[0].partition("=")[0]
            meant = self._meant(word)
            told = f"unknown {'option' if word.startswith('-') else 'argument'} {words.split()[0]}{meant}"
            raise UserError(told if meant else f"{told}: this command takes {self._summary()}.")
        raise UserError(f"{message}; the command takes {self._summary()}.")

    def divide(self, words: Sequence[str], is_own: Callable[[str], bool]) -> tuple[list[str], list[str]]:
        """Divide a line before the first word that is no option, no value of one and not ``is_own``."""
        position = 0
        while position < len(words):
            word = words[position]
            if word == "--":
                return list(words[:position]), list(words[position + 1 :])
            action = self._option_string_actions.get(word.partition("=")[0])
            if action is None and not word.startswith("-") and not is_own(word):
                break
            takes_next = action is not None and action.nargs != 0 and "=" not in word
            position += 2 if takes_next else 1
        return list(words[:position]), list(words[position:])

    def has_option(self, word: str) -> bool:
        """Whether a word is an option of this command line, with a value in it or without."""
        return word.partition("=")[0] in self._option_string_actions

    def one_line(self) -> str:
        """All options, in brackets, for a usage of one's own."""
        actions = [action for action in self._actions if action.option_strings]
        return " ".join(
            f"[{action.option_strings[-1]}{'' if action.nargs == 0 else f' {action.metavar}'}]" for action in actions
        )

    def _options(self) -> list[str]:
        return [word for word in self._option_string_actions if word.startswith("--")]

    def _meant(self, word: str) -> str:
        """Options that look like a word, or of which it is a part: --rate of --audio-rate."""
        plain = word.lstrip("-")
        inside = [option for option in self._options() if len(plain) > 2 and plain in option]
        return did_you_mean(inside or near(f"--{plain}", self._options(), looks=0.7))

    def _summary(self) -> str:
        """The positional arguments and all options, in one line."""
        return " ".join(self.format_usage().removeprefix("usage: ").split())


def command_parser(command: str, text: str | None) -> Parser:
    """The command line of ``mome-dist COMMAND``, whose help is the text of its module, with the examples in it."""
    return Parser(prog=f"mome-dist {command}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``overrides``: all words that are no options. Such a line is read by ``parse_intermixed_args``."""
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for mome-dist train")


_FROZEN = ("llm", "audio_encoder", "video_encoder")


def add_frozen_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--llm``, ``--audio-encoder`` and ``--video-encoder`` to a command that loads a trained model."""
    for section in _FROZEN:
        option, what = f"--{section.replace('_', '-')}", section.replace("_", " ").replace("llm", "LLM")
        parser.add_argument(option, metavar="DIR", help=f"the frozen {what}, if it is elsewhere now")


def frozen_of(options: argparse.Namespace) -> dict[str, str]:
    """The directories that those options name, by section of the configuration."""
    return {section: place for section in _FROZEN if (place := getattr(options, section)) is not None}
