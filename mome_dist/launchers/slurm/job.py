"""The allocation that Slurm gave to this job, read from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mome_dist.errors import UserError
from mome_dist.launchers.slurm.commands import hostnames
from mome_dist.ports import free_port


@dataclass(frozen=True)
class Job:
    """An allocation.

    Attributes:
        id: of the job, the same after a requeue.
        nodes: names; this process runs on the first.
        tasks_per_node: ranks on each node.
    """

    id: str
    nodes: list[str]
    tasks_per_node: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Read what sbatch and Slurm set.

        Raises:
            UserError: not in a job, or nodes without the cores for their ranks.
        """
        if "SLURM_JOB_ID" not in environment:
            raise UserError("this runs inside a Slurm job: submit one of slurm/*.sh with sbatch.")
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        # Without --ntasks-per-node there is a rank for each GPU.
        tasks = int(environment.get("SLURM_NTASKS_PER_NODE") or gpus or 1)
        each = int(environment.get("SLURM_CPUS_PER_TASK") or 1)
        cores = int(environment.get("SLURM_CPUS_ON_NODE") or tasks * each)
        if cores < tasks * each:
            raise UserError(
                f"the allocation has {cores} cores on a node for {tasks} ranks of {each}: add "
                f"--ntasks-per-node={tasks} to sbatch, or lower --cpus-per-task."
            )
        return cls(environment["SLURM_JOB_ID"], hostnames(environment["SLURM_JOB_NODELIST"]), tasks)

    @property
    def world_size(self) -> int:
        return len(self.nodes) * self.tasks_per_node

    def rank_options(self) -> list[str]:
        """Options of srun that start one process a rank, neighbours on the same node."""
        command = [f"--nodes={len(self.nodes)}", f"--ntasks={self.world_size}"]
        command += [f"--ntasks-per-node={self.tasks_per_node}", "--distribution=block", "--input=none", "--overlap"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            command.append(f"--cpus-per-task={cpus}")  # srun no longer takes it from sbatch by itself
        return command


def job_port(job: str) -> int:
    """A TCP port that is free on this machine; jobs look from different starts on, so that two do not meet.

    Args:
        job: number of the job.
    """
    return free_port(int(job) * 17)
