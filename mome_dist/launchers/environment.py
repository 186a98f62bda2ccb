"""The environment variables and the cores of one rank, found without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mome_dist.launchers.gpus import near_cores

LOOPBACK = "127.0.0.1"
INTERFACE = "MOME_DIST_INTERFACE"  # the network interface of NCCL and gloo, where they would choose a wrong one


def own_cores() -> frozenset[int]:
    """The cores that this process may run on (its affinity mask, as Slurm and containers set it)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(own_cores())


@dataclass(frozen=True)
class Machine:
    """What the ranks of one machine have together, as one of them sees it.

    Attributes:
        ranks: of this machine.
        cores: that this process may run on.
        allotted: how many cores the ranks have together. Where Slurm has bound each to its own, a process sees a part.
        gpus: addresses of the visible GPUs, as `mome_dist.launchers.gpus.visible_gpus` finds them.
        devices: root of the kernel's file system of devices.
    """

    ranks: int
    cores: frozenset[int]
    allotted: int
    gpus: Sequence[str] = ()
    devices: Path = Path("/sys")

    @property
    def share(self) -> int:
        """Cores of a rank if all get the same."""
        return max(1, self.allotted // self.ranks)

    @property
    def threads(self) -> int:
        """Threads that a rank best starts: its share of the cores, once, however many of them it may run on."""
        return min(self.share, len(self.cores))

    def cores_of(self, local_rank: int) -> frozenset[int]:
        """The cores that a rank should run on: those of its GPU's NUMA node.

        All that it may run on where nothing is known, where they are its own already, and where the ranks of that
        node would have fewer cores each than all ranks have now.
        """
        if len(self.cores) <= self.share or len(self.gpus) < self.ranks:
            return self.cores
        near = [self._near(address) for address in self.gpus[: self.ranks]]
        mine = near[local_rank]
        return mine if len(mine) >= self.share * near.count(mine) else self.cores

    def _near(self, address: str) -> frozenset[int]:
        return (near_cores(address, self.devices) or self.cores) & self.cores


def tuning(machine: Machine) -> dict[str, str]:
    """Variables that the ranks of a machine run best with; a user's own values should win over them."""
    variables = {
        # Ranks that each start a thread a core would spend their time waiting for each other.
        "OMP_NUM_THREADS": str(machine.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Everything is in the cache: a missing file is an error here, not a download.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not machine.gpus:
        variables["DS_ACCELERATOR"] = "cpu"
        # glibc gives the memory of large tensors back to the kernel and gets it anew, cleared page by page, in every
        # step: for gradients that takes longer than computing them. Up to these sizes it is to be kept.
        variables["MALLOC_MMAP_THRESHOLD_"] = str(2**30)
        variables["MALLOC_TRIM_THRESHOLD_"] = str(2**32)
    return variables


def rank_environment(rank: int, machine: Machine, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of `rank` in a world of ``machine.ranks`` processes on this machine.

    The rendezvous variables always win over `base`; the tuning variables only fill gaps, so that a user's own
    ``OMP_NUM_THREADS`` or ``HF_HUB_OFFLINE`` stays.
    """
    rendezvous = {
        "RANK": str(rank),
        "WORLD_SIZE": str(machine.ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(machine.ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
    }
    return {"GLOO_SOCKET_IFNAME": "lo", **tuning(machine), **base, **rendezvous}
