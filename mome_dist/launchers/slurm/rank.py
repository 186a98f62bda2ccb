"""What srun starts for each rank: Slurm's numbering becomes the usual variables, then this process becomes the rank.

    srun ... python -m mome_dist.launchers.slurm.rank mome_dist.train key=value ...

MASTER_ADDR and MASTER_PORT come from the first node of the allocation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from mome_dist.launchers.environment import INTERFACE, Machine, own_cores, tuning
from mome_dist.launchers.gpus import visible_gpus


def machine_of(base: Mapping[str, str]) -> Machine:
    """This node, as a Slurm task with this environment sees it."""
    cores = own_cores()
    allotted = int(base.get("SLURM_CPUS_ON_NODE") or len(cores))
    return Machine(int(base["SLURM_NTASKS_PER_NODE"]), cores, allotted, visible_gpus(base))


def task_environment(base: Mapping[str, str], machine: Machine) -> dict[str, str]:
    """The environment of a rank, from that of a Slurm task on ``machine``.

    As with `mome_dist.launchers.environment.rank_environment`, the user's own tuning variables stay.
    """
    # With --gpus-per-task each task sees its own devices only, from number 0 on: all together are no more than the
    # node's, as they would be if the tasks saw the same ones.
    own_devices = len(machine.gpus) * machine.ranks <= int(base.get("SLURM_GPUS_ON_NODE") or machine.ranks)
    environment = {**tuning(machine), **base}
    environment |= {
        "RANK": base["SLURM_PROCID"],
        "WORLD_SIZE": base["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if machine.gpus and own_devices else base["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(machine.ranks),
    }
    if INTERFACE in base:
        environment |= {"NCCL_SOCKET_IFNAME": base[INTERFACE], "GLOO_SOCKET_IFNAME": base[INTERFACE]}
    return environment


def become_task(base: Mapping[str, str]) -> dict[str, str]:
    """Bind this process to the cores of its rank; return the rank's environment."""
    machine = machine_of(base)
    if machine.gpus:
        os.sched_setaffinity(0, machine.cores_of(int(base["SLURM_LOCALID"])))
    return task_environment(base, machine)


def main() -> None:
    """Become ``python -m MODULE ARGUMENTS...``: signals and exit codes are then the rank's own."""
    os.execve(sys.executable, [sys.executable, "-m", *sys.argv[1:]], become_task(os.environ))  # noqa: S606


if __name__ == "__main__":
    main()
