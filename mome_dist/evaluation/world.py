"""The processes of an evaluation: each holds a whole model and decodes a share of the batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mome_dist.parallel import rendezvous
from mome_dist.parallel.backend import GLOO
from mome_dist.parallel.device import device_to_share
from mome_dist.parallel.plain_world import World
from mome_dist.parallel.whereabouts import watched


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
