"""What one rank can tell about its node without talking to others."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mome_dist
from mome_dist.versions import version_of

PACKAGES = ("mome_dist", "torch", "megatron-core", "deepspeed", "transformers")


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """The node of this rank: as Slurm calls it, else its host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def describe_rank(device: torch.device) -> dict[str, Any]:
    """Versions, devices, cores and memory as this rank sees them, JSON-serialisable.

    ``software`` and ``hardware`` should be the same on all nodes; a rank that sees its own GPU only reports one.
    """
    software = {"python": platform.python_version()}
    software |= {name: version_of(name) for name in PACKAGES}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hardware: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gb": round(memory / 1e9, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory
        software |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        hardware |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "gpu_gb": round(memory / 1e9, 1)}
        # What torch has a kernel for (F.grouped_mm of bf16).
        hardware |= {"grouped_products": properties.major in (9, 10)}
    return {
        "node": node_name(),
        "software": software,
        "hardware": hardware,
        "code": str(Path(mome_dist.__file__).parent),
        "executable": sys.executable,
        "memory_bytes": memory,
    }
