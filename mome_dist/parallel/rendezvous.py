"""Joining a world: the ranks meet in a store, and one that does not come is named."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mome_dist.errors import RankLostError
from mome_dist.parallel.gloo import share_devices

_ARRIVED = "arrived/{}"
_POLL_SECONDS = 0.02
STORE_SECONDS = 5.0  # for an answer of the store

T = TypeVar("T")


def join(backend: str, timeout_seconds: float) -> None:
    """Open the default process group of the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Alone (no RANK), it opens a world of one.

    Raises:
        RankLostError: if a rank does not come in time; it is named.
    """
    share_devices()
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's agent keeps a store of its own; else rank 0 does.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = open_store(timeout_seconds, serves)
        _meet(store, rank, size, timeout_seconds)
    except dist.DistError as error:
        if serves:
            raise  # the port is taken: nothing to do with other ranks
        raise RankLostError(
            f"rank {rank} ({socket.gethostname()}) lost or did not find the rendezvous at {_address()} within "
            f"{timeout_seconds:g} s: rank 0's process has not started or is gone. Look at its log and host, and at "
            "MASTER_ADDR and MASTER_PORT."
        ) from error
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)


def open_store(timeout_seconds: float, serves: bool = False) -> dist.TCPStore:
    """A connection of its own to the store of this world; ``serves`` opens the store itself, on rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(
        address,
        port,
        is_master=serves,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )


def ask(
    question: Callable[[dist.TCPStore], T], store: dist.TCPStore | None = None, seconds: float = STORE_SECONDS
) -> T | None:
    """What the store of this world answers, over a connection of its own by default; None if it does not answer.

    Where nobody listens any more the answer is None at once.
    """
    answers: list[T] = []

    def wait_for_answer() -> None:
        # No answer tells enough.
        with suppress(dist.DistError, OSError):
            if store is None:
                _knock(seconds)
            answers.append(question(store or open_store(seconds)))

    # In a thread of its own: a store whose process is stopped never answers.
    asking = threading.Thread(target=wait_for_answer, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def _knock(seconds: float) -> None:
    """Raise OSError at once where nobody listens: a store's own client would try again until its timeout."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection(address, timeout=seconds).close()


@contextmanager
def timeout_of_every_group(timeout_seconds: float) -> Iterator[None]:
    """Give this timeout to every process group that is made inside the block without one.

    torch would give 10 minutes (NCCL) or 30 (gloo), whatever the default group has; DeepSpeed never says.
    """
    defaults = {name: getattr(distributed_c10d, name) for name in ("default_pg_timeout", "default_pg_nccl_timeout")}
    try:
        for name in defaults:
            setattr(distributed_c10d, name, timedelta(seconds=timeout_seconds))
        yield
    finally:
        for name, value in defaults.items():
            setattr(distributed_c10d, name, value)


def _meet(store: dist.TCPStore, rank: int, size: int, timeout_seconds: float) -> None:
    """Wait until every rank has written its name into the store."""
    store.set(_ARRIVED.format(rank), socket.gethostname())
    missing, deadline = list(range(size)), time.monotonic() + timeout_seconds
    while missing := [other for other in missing if not store.check([_ARRIVED.format(other)])]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise RankLostError(
                f"{len(missing)} of {size} ranks did not come to {_address()} within {timeout_seconds:g} s: {names}. "
                "Look at their logs and hosts, or raise parallel.timeout_seconds."
            )
        time.sleep(_POLL_SECONDS)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
