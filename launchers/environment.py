"""The environment variables of one rank, found without importing torch."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOOPBACK = "127.0.0.1"


def has_cuda(environment: Mapping[str, str]) -> bool:
    """Tell whether a process with this environment could use an NVIDIA GPU: driver, visible device, torch for CUDA.

    A guess by its signs, because importing torch to ask takes seconds and may initialise CUDA in the parent.
    """
    if environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    try:
        if version("torch").endswith("+cpu"):
            return False
    except PackageNotFoundError:
        return False
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def usable_cores() -> int:
    """Return how many cores this process may run on (its affinity mask, as Slurm and containers set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def tuning(local_size: int, base: Mapping[str, str]) -> dict[str, str]:
    """Variables that `local_size` ranks on one machine run best with; a user's own values should win over them."""
    variables = {
        # Two ranks that each start a thread a core would spend their time waiting for each other.
        "OMP_NUM_THREADS": str(max(1, usable_cores() // local_size)),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Everything is in the cache: a missing file is an error here, not a download.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not has_cuda(base):
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def rank_environment(rank: int, world_size: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of `rank` in a world of `world_size` processes on this machine.

    The rendezvous variables always win over `base`; the tuning variables only fill gaps, so that a user's own
    ``OMP_NUM_THREADS`` or ``HF_HUB_OFFLINE`` stays.
    """
    rendezvous = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }
    return {"GLOO_SOCKET_IFNAME": "lo", **tuning(world_size, base), **base, **rendezvous}
