"""What srun starts for each rank: Slurm's numbering becomes the usual variables, then this process becomes the rank.

    srun ... python -m launchers.slurm.rank mome_dist.train key=value ...

MASTER_ADDR and MASTER_PORT come from the first node of the allocation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from launchers.environment import tuning

INTERFACE = "MOME_DIST_INTERFACE"  # the network interface of NCCL and gloo, where they would choose a wrong one


def task_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank, from that of a Slurm task.

    As with `launchers.environment.rank_environment`, the user's own tuning variables stay.
    """
    local_size = int(base["SLURM_NTASKS_PER_NODE"])
    devices = base.get("CUDA_VISIBLE_DEVICES", "")
    # With --gpus-per-task each task sees its own device only, as number 0.
    own_device = local_size > 1 and devices != "" and "," not in devices
    environment = {**tuning(local_size, base), **base}
    environment |= {
        "RANK": base["SLURM_PROCID"],
        "WORLD_SIZE": base["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if own_device else base["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    if INTERFACE in base:
        environment |= {"NCCL_SOCKET_IFNAME": base[INTERFACE], "GLOO_SOCKET_IFNAME": base[INTERFACE]}
    return environment


def main() -> None:
    """Become ``python -m MODULE ARGUMENTS...``: signals and exit codes are then the rank's own."""
    os.execve(sys.executable, [sys.executable, "-m", *sys.argv[1:]], task_environment(os.environ))  # noqa: S606


if __name__ == "__main__":
    main()
