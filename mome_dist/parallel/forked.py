"""Worlds of processes on one machine, from one function.

Forked ones start in milliseconds, for the parent has imported everything; but a fork inherits no threads and no GPU:
the parent must not open a process group, use CUDA, nor run torch operations on more than one thread, before it forks.
Spawned ones begin with nothing, import for seconds, and may use GPUs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

from mome_dist.ports import free_port

_POLL_SECONDS = 0.5


def compute_on_cpu() -> None:
    """Prepare this process for forking worlds; to be called before it imports torch.

    No library starts threads, and none touches a GPU: one that the parent has looked at is lost to its forks.
    """
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")


@contextmanager
def _objects_left_alone() -> Iterator[None]:
    """Keep what the parent holds out of the garbage collections of its forks: they would copy every page of it."""
    if gc.get_freeze_count():  # the parent has done so for good
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _take_place(rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


class ForkedRank:
    """A forked process that ends with a code, as a command does; it leads a process group of its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._waiting = threading.Lock()

    def wait(self) -> int:
        """Wait for its end: its exit code, or minus the signal that killed it, as `subprocess.Popen.wait`."""
        with self._waiting:
            if self._code is None:
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._code


def fork_ranks(main: Callable[..., int], world: int, *args: Any, logs: Path | None = None) -> list[ForkedRank]:
    """Start ``main(*args)`` on ``world`` forked ranks, to be waited for and killed like commands.

    Args:
        main: returns the exit code of its rank.
        logs: folder for what each rank prints (``rank-N.log``); by default it goes where the parent prints.
    """
    port, ranks = free_port(), []
    with _objects_left_alone():
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.setpgid(0, 0)
                    if logs is not None:
                        log = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                        os.dup2(log, 1)
                        os.dup2(log, 2)
                        # A parent that captures output has objects of its own in their place.
                        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
                    _take_place(rank, world, port)
                    code = main(*args)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            with suppress(ProcessLookupError, PermissionError):  # the child has done it, or is gone
                os.setpgid(pid, pid)
            ranks.append(ForkedRank(pid))
    return ranks


def _worker(
    function: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    _take_place(rank, world, port)
    try:
        outcome = (rank, True, function(*args))
    except BaseException:
        outcome = (rank, False, traceback.format_exc())
    results.put(outcome)
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


def run_forked(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``function(*args)`` on ``world`` forked ranks and return their results in rank order.

    Each rank finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment. Results must not hold torch
    tensors: return numpy arrays or numbers.

    Raises:
        RuntimeError: if a rank fails, ends, or gives no result within ``timeout`` seconds; no process is left behind.
    """
    return _run(multiprocessing.get_context("fork"), function, world, args, timeout)


def run_spawned(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`run_forked` with ranks that may use GPUs; the function and its arguments are pickled, so it has a name in a
    module."""
    return _run(multiprocessing.get_context("spawn"), function, world, args, timeout)


def _run(
    context: ForkContext | SpawnContext,
    function: Callable[..., Any],
    world: int,
    args: tuple[Any, ...],
    timeout: float,
) -> list[Any]:
    results, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_worker, args=(function, rank, world, port, results, args)) for rank in range(world)
    ]
    with _objects_left_alone():
        for worker in workers:
            worker.start()
    gathered: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(gathered) < world:
            # Looked at before the queue: what a worker says comes before its end.
            ended = [rank for rank in range(world) if rank not in gathered and workers[rank].exitcode is not None]
            try:
                rank, succeeded, value = results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if ended:
                    raise RuntimeError(
                        f"rank {ended[0]} of {world} ended with code {workers[ended[0]].exitcode} and no result"
                    ) from None
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world)) - gathered.keys())
                    raise RuntimeError(f"ranks {missing} of {world} gave no result within {timeout:.0f} s") from None
                continue
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
            gathered[rank] = value
    finally:
        for worker in workers:
            worker.join(timeout=5 if len(gathered) == world else 0)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return [gathered[rank] for rank in range(world)]
