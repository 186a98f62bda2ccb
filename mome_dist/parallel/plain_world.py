"""A plain data-parallel world, for the small pre-training jobs that come before MoME.

These jobs hold a whole model on every rank, so they need neither Megatron nor DeepSpeed: the ranks sum their gradients
and take the same step. Every quantity is a function of the seed and the step, never of the number of ranks: a batch is
cut into fixed groups of samples and the groups are dealt out, so 1 and 4 processes train the same model up to the order
of floating-point sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.parallel import rendezvous
from mome_dist.parallel.device import own_place
from mome_dist.parallel.whereabouts import wait_for_all, watched

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of a data-parallel job. A world of one needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self, what: str = "the others' work") -> None:
        """Wait for every rank, for as long as the slowest one works."""
        wait_for_all(what)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one message for all (they share dtype and device)."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def gather(self, share: T, what: str) -> list[T] | None:
        """Return every rank's ``share`` in rank order on rank 0, None elsewhere; ``what`` the others may still do is
        waited for."""
        if self.size == 1:
            return [share]
        wait_for_all(what)
        gathered: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(share, gathered)
        return gathered  # type: ignore[return-value]

    def agree(self, value: bool) -> bool:
        """Return rank 0's ``value`` on every rank, so that all take the same branch."""
        return self.share(value)

    def share(self, value: T) -> T:
        """Return rank 0's ``value`` on every rank; it is pickled."""
        shared = [value]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]


@contextmanager
def open_world(timeout_seconds: int = 600) -> Iterator[World]:
    """Join the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without them, be alone.

    `mome_dist.parallel.backend` says over what. A lost rank ends the others with an error that names it.
    """
    device, backend = own_place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    rendezvous.join(backend, timeout_seconds)
    with watched(timeout_seconds, dist.destroy_process_group):
        yield World(dist.get_rank(), dist.get_world_size(), device)
