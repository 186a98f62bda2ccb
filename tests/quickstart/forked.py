"""Commands in forks of this process, which has imported what they import: a start takes milliseconds.

Ranks of ``launchers.local`` are forks too. All else is as in an interpreter of its own: the folder, the environment,
the arguments, what is written where, and the exit code.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import cv2

from launchers import ranks
from launchers.ranks import RankGroup
from mome_dist.parallel.forked import ForkedRank
from tests.parallel import worlds  # noqa: F401  imports what commands import, and no library starts threads

cv2.setNumThreads(1)


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Run ``python words...`` in a folder; `CompletedProcess` has what it wrote.

    Args:
        timeout: seconds; after them the command and its ranks are killed, and the code is 124.
    """
    said = [folder / f"command.{name}" for name in ("out", "err")]

    def command() -> None:
        os.chdir(folder)
        # This process writes nothing more, and ends as its caller would wish for: only its own ranks follow it.
        RankGroup.start = _start_forks  # type: ignore[method-assign]
        _become(words, environment)

    with RankGroup() as group:
        group.follow([_fork(command, *(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in said))])
        code = group.wait(timeout).code
    out, err = (path.read_text(errors="replace") for path in said)
    return CompletedProcess(list(words), code, out, err)


def _start_forks(
    self: RankGroup,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Sequence[Path],
    cores: Sequence[frozenset[int]] | None = None,
) -> None:
    """`RankGroup.start` with forks; without GPUs no rank is bound to cores."""
    assert cores is None
    started = []
    for rank, environment in enumerate(environments):
        logged = [] if rank == 0 else [os.open(logs[rank - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)] * 2
        started.append(_fork(lambda: _become(command[1:], environment), *logged))  # noqa: B023  called in this turn
    self.follow(started)


def _become(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do what ``python words...`` does; ends with SystemExit, or returns for a code of 0."""
    os.environ.clear()
    os.environ.update(environment)
    module = words[0] == "-m"
    sys.argv[:] = words[module:]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _fork(main: Callable[[], None], *outputs: int) -> ForkedRank:
    """A fork that runs ``main`` and ends as an interpreter does, in a session of its own; it dies with this process.

    Args:
        outputs: files for standard output and error, which are closed here; none for those of this process.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        for file in set(outputs):
            os.close(file)
        return ForkedRank(pid)
    code = 1
    try:
        os.setsid()
        ranks._die_with(parent)
        for number in ranks.FORWARDED_SIGNALS:  # which the group of the parent handles
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        for file, stream in zip(outputs, (1, 2), strict=False):
            os.dup2(file, stream)
        # Where output is captured, there are other objects in their place.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
