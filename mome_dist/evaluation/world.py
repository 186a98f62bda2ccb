"""The processes of an evaluation: each holds a whole model and decodes a share of the batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from mome_dist.parallel import rendezvous
from mome_dist.parallel.backend import GLOO
from mome_dist.parallel.device import device_to_share
from mome_dist.parallel.whereabouts import wait_for_all, watched

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place; a world of one needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, share: T) -> list[T] | None:
        """Every rank's ``share`` in rank order on rank 0, None elsewhere."""
        if self.size == 1:
            return [share]
        wait_for_all("decoding")  # the ranks' batches differ, and so does the time they take
        gathered: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(share, gathered)
        return gathered  # type: ignore[return-value]


@contextmanager
def join_world(timeout_seconds: int) -> Iterator[World]:
    """Join the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without them, be alone.

    Ranks exchange texts and counts only, so the group is gloo's even where each rank decodes on a GPU.
    """
    device = device_to_share()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    rendezvous.join(GLOO, timeout_seconds)
    with watched(timeout_seconds, dist.destroy_process_group):
        yield World(dist.get_rank(), dist.get_world_size(), device)
