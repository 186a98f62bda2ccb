"""Forked gloo worlds: the parent imports everything once, the workers are forks of it and start in milliseconds.

The parent must not open a process group nor run multi-threaded torch work before it forks; pytest imports this module
before any test runs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)

import mome_dist.parallel.initialize
import mome_dist.parallel.model
import mome_dist.training.engine
import mome_dist.training.step  # noqa: F401  imported once here, inherited by every fork


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(
    function: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        outcome = (rank, True, function(*args))
    except BaseException:
        outcome = (rank, False, traceback.format_exc())
    results.put(outcome)
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


def run_world(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``function(*args)`` on ``world`` forked ranks and return their results in rank order.

    Results must not hold torch tensors (return numpy arrays or numbers). Fails if any rank raises or hangs.
    """
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_worker, args=(function, rank, world, port, queue, args)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    gathered: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, succeeded, value = queue.get(timeout=timeout)
            assert succeeded, f"rank {rank} of {world} failed:\n{value}"
            gathered[rank] = value
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return [gathered[rank] for rank in range(world)]
