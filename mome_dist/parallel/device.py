"""The device of this process; `mome_dist.parallel.backend` has the rules."""

from __future__ import annotations

import os

import torch

from mome_dist.parallel.backend import GLOO, asked_backend, place


def own_place() -> tuple[torch.device, str]:
    """The device of this process, and the backend of its world.

    Raises:
        UserError: if NCCL has no GPU for this rank, or the environment asks for an unknown backend.
    """
    device, backend = place(_local_rank(), _gpus(), asked_backend(os.environ))
    return torch.device(device), backend


def current_device() -> torch.device:
    """The device of this process."""
    return own_place()[0]


def device_to_share() -> torch.device:
    """The device of this process where ranks exchange no tensors of GPUs, and may share one."""
    return torch.device(place(_local_rank(), _gpus(), GLOO)[0])


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
