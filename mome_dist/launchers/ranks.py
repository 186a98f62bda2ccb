"""A group of rank processes that live and die together.

The rules: the first rank that fails ends the others; signals to the launcher reach every rank once; when the launcher
itself is killed, the kernel kills the ranks (``PR_SET_PDEATHSIG``). Every rank leads a process group of its own, so
that its own children, such as data workers, end with it.

torchrun ends with code 1 whatever a rank ended with, so that nobody could tell a mistake, which no restart mends, from
a preemption or a lost rank (`mome_dist.exit_codes`). A training runs under it all the same: it sets what ranks read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from mome_dist.exit_codes import PREEMPTED, RANK_LOST, TIMED_OUT, USER_ERROR

TERMINATE_GRACE_SECONDS = 10.0
LOST_GRACE_SECONDS = 2.0
# How long the other ranks may take to say the same; finding out which rank is lost takes a few seconds.
TOLD_GRACE_SECONDS = {USER_ERROR: 3.0, PREEMPTED: 10.0, RANK_LOST: 10.0}
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Outcome:
    """How a group ended.

    Attributes:
        code: exit code of the first rank to fail; 0 when none did, 124 when time ran out.
        failed_rank: that rank; None on success or when time ran out.
        told: rank 0 ended with a code whose reason it has printed (a `UserError`, a lost rank, a preemption).
        asked_to_stop: the launcher was sent a signal.
    """

    code: int
    failed_rank: int | None = None
    told: bool = False
    asked_to_stop: bool = False


class Process(Protocol):
    """What a group needs of a process: `subprocess.Popen`, or a fork."""

    pid: int

    def wait(self) -> int:
        """Wait for its end; its exit code, or minus the number of the signal that killed it."""


class RankGroup:
    """The processes of one local world; use it as a context manager, which leaves no process behind."""

    def __init__(self) -> None:
        self._processes: list[Process] = []
        self._exits: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._running: set[int] = set()
        self._codes: dict[int, int] = {}
        self._early: list[int] = []
        self._received: list[int] = []
        self._noting = contextlib.ExitStack()

    def __enter__(self) -> RankGroup:
        # Until `wait` passes them on, signals are only remembered: none may end the launcher while ranks start.
        self._noting.enter_context(_handling(lambda number, _: self._early.append(number)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._signal_groups(signal.SIGKILL, range(len(self._processes)))
        for process in self._processes:
            process.wait()
        self._noting.close()
        for number in self._early:  # came when no rank was left to have it
            os.kill(os.getpid(), number)

    def start(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        logs: Sequence[Path],
        cores: Sequence[frozenset[int]] | None = None,
    ) -> None:
        """Start ``len(environments)`` ranks. Rank 0 writes to the terminal, rank N to ``logs[N - 1]``.

        Args:
            cores: that each rank is bound to; None leaves all where the launcher runs.
        """
        launcher = os.getpid()
        for rank, environment in enumerate(environments):
            with contextlib.ExitStack() as stack:
                if cores is not None:
                    stack.enter_context(_running_on(cores[rank]))
                output = None if rank == 0 else stack.enter_context(logs[rank - 1].open("wb"))
                process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    start_new_session=True,
                    # Sound here: the launcher has no other thread yet, and the function allocates nothing.
                    preexec_fn=lambda: _die_with(launcher),
                )
            self._processes.append(process)  # one by one: they are to be ended even if the next one fails to start
        self._watch()

    def follow(self, processes: Sequence[Process]) -> None:
        """Take over ranks that were started in another way, each the leader of a process group of its own."""
        self._processes = list(processes)
        self._watch()

    def _watch(self) -> None:
        self._running = set(range(len(self._processes)))
        # One waiting thread a rank keeps the order of exits, which polling would lose: who failed first matters.
        for rank in range(len(self._processes)):
            threading.Thread(target=self._wait_for, args=(rank,), daemon=True).start()

    def wait(self, timeout: float | None) -> Outcome:
        """Wait until every rank has ended, one has failed, or `timeout` seconds are over; end the others."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._signals_forwarded():
            while self._running:
                ended = self._next_exit(deadline)
                if ended is None:
                    self._terminate(TERMINATE_GRACE_SECONDS)
                    return Outcome(TIMED_OUT, asked_to_stop=bool(self._received))
                rank, code = ended
                if code != 0:
                    if code in TOLD_GRACE_SECONDS:
                        # All ranks meet the same: let rank 0 come to print its line.
                        self._drain(TOLD_GRACE_SECONDS[code], until=0)
                    # Rank 0 with an error of its own keeps the store open until the others have read of it.
                    causes = [(r, c) for r, c in self._codes.items() if c not in (0, RANK_LOST)]
                    # A rank that the others have found to hang does not listen, and has nothing left to save.
                    self._terminate(LOST_GRACE_SECONDS if code == RANK_LOST else TERMINATE_GRACE_SECONDS)
                    if code == RANK_LOST and causes:
                        rank, code = causes[0]
                    told = code == self._codes.get(0) and code in TOLD_GRACE_SECONDS
                    return Outcome(code, rank, told, bool(self._received))
        return Outcome(0)

    def _wait_for(self, rank: int) -> None:
        code = self._processes[rank].wait()
        self._exits.put((rank, code if code >= 0 else 128 - code))

    def _next_exit(self, deadline: float | None) -> tuple[int, int] | None:
        """Return the next (rank, exit code), or None when the deadline passes first."""
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            rank, code = self._exits.get(timeout=left)
        except queue.Empty:
            return None
        self._running.discard(rank)
        self._codes[rank] = code
        return rank, code

    def _drain(self, seconds: float, until: int | None = None) -> None:
        """Wait for the end of all ranks, or of rank ``until``."""
        deadline = time.monotonic() + seconds
        while self._running if until is None else until in self._running:
            if self._next_exit(deadline) is None:
                break

    def _terminate(self, seconds: float) -> None:
        """SIGTERM to what still runs, some seconds to end, then SIGKILL."""
        self._signal_groups(signal.SIGTERM, self._running)
        self._drain(seconds)
        self._signal_groups(signal.SIGKILL, self._running)

    def _signal_groups(self, number: int, ranks: Sequence[int] | set[int] | range) -> None:
        for rank in list(ranks):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, number)

    @contextlib.contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        def forward(number: int, _: FrameType | None) -> None:
            repeated = number == signal.SIGINT and signal.SIGINT in self._received
            self._received.append(number)
            # A second Ctrl-C means it.
            self._signal_groups(signal.SIGKILL if repeated else number, self._running)

        with _handling(forward):
            early, self._early = self._early, []
            for number in early:
                forward(number, None)
            yield


@contextlib.contextmanager
def _handling(handler: object) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in FORWARDED_SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _running_on(cores: frozenset[int]) -> Iterator[None]:
    """Run this thread, and the processes that it starts, on some of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _die_with(launcher: int) -> None:
    """In the child, before exec: ask the kernel for SIGKILL when the launcher dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the request
        os._exit(1)
