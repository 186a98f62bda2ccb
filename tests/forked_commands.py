"""Commands in forks of this process, which has imported what they import: a start takes milliseconds, not seconds.

Ranks of ``launchers.local`` are forks too, and the tuner's trials. All else is as in interpreters of their own: the
folder, the environment, the arguments, what is written where, the exit code. That a program starts by itself is for
other tests to show.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import cv2

from mome_dist.launchers import ranks
from mome_dist.launchers.ranks import RankGroup
from mome_dist.parallel.forked import ForkedRank
from mome_dist.tuning import trial
from tests.parallel import worlds  # noqa: F401  imports what commands import, and no library starts threads

cv2.setNumThreads(1)


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Run ``python words...`` in a folder; return its exit code and what it wrote.

    Args:
        timeout: seconds; after them the command and its ranks are ended, and the code is 124.
    """

    def command() -> None:
        os.chdir(folder)
        # In the fork alone: what commands start are forks as well.
        RankGroup.start = _start_forks  # type: ignore[method-assign]
        trial._run = _run_trial
        _become(words, environment)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, RankGroup() as group:
        group.follow([_fork(command, out.fileno(), err.fileno())])
        code = group.wait(timeout).code
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(list(words), code, *(file.read().decode(errors="replace") for file in (out, err)))


def _start_forks(
    self: RankGroup,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path],
    cores: Sequence[frozenset[int]] | None = None,
) -> None:
    """`RankGroup.start` with forks, which are bound to no cores."""
    assert cores is None, "a GPU is for processes that have not been forked"
    started = []
    for rank, environment in enumerate(environments):
        with ExitStack() as stack:
            outputs = (1, 2) if rank == 0 else [stack.enter_context(logs[rank - 1].open("wb")).fileno()] * 2
            started.append(_fork(lambda its=environment: _become(command[1:], its), *outputs))  # type: ignore[misc]
    self.follow(started)


def _run_trial(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """How the tuner starts the launcher."""
    done = run(command[1:], Path.cwd(), os.environ, timeout)
    return done.returncode, done.stdout + done.stderr


def _become(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do what ``python words...`` does; returns for a code of 0, or ends with SystemExit."""
    variables = dict(environment)  # which may be those of this process
    os.environ.clear()
    os.environ.update(variables)
    module = words[0] == "-m"
    sys.argv[:] = words[module:]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _fork(main: Callable[[], None], out: int, err: int) -> ForkedRank:
    """A fork that runs ``main`` and ends as an interpreter does, in a session of its own; it dies with this process.

    Args:
        out, err: file descriptors of what are to be its standard output and error.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return ForkedRank(pid)
    code = 1
    try:
        os.setsid()
        ranks._die_with(parent)
        for number in ranks.FORWARDED_SIGNALS:  # which the group of the parent handles
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(err, 2)
        # Where output is captured, there are other objects in their place.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
