"""What every command line shares: mistakes of the user end in one line on stderr, not in a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from mome_dist.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

P = ParamSpec("P")


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a command's ``main`` so that it returns an exit code (None counts as 0).

    A `UserError` becomes ``error: <message>`` and code 2. In a distributed run only rank 0 prints it: all ranks meet
    the same mistake, and one line is enough. Ctrl-C becomes code 130. Any other exception is a bug and keeps its
    traceback. Use it as ``sys.exit(main_guard(main)())``, or as a decorator.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print_error(error)
            return USER_ERROR
        except KeyboardInterrupt:
            return INTERRUPTED

    return guarded


def print_error(error: UserError) -> None:
    """Print ``error: <message>`` to stderr."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
