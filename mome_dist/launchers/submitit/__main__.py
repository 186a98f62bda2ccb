"""Run through Submitit: one job, or a Hydra sweep as a job array.

    mome-dist launch submitit launcher.nodes=2 launcher.tasks_per_node=8 launcher.gpus_per_node=8 train experiment=lrs3
    mome-dist launch submitit --multirun launcher.tasks_per_node=8 train experiment=lrs3 seed=0,1
    python -m launchers.submitit experiment=lrs3 launcher.nodes=2 launcher.tasks_per_node=8

A job is submitted and left alone; it requeues itself and continues. A sweep waits for its jobs and prints their losses.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mome_dist.cli import main_guard
from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.launchers.options import (
    DEFAULT_MODULE,
    SubmititOptions,
    check_run,
    cores_of_rank,
    load_options,
    parse_arguments,
)
from mome_dist.launchers.slurm.commands import require_slurm


def parameters(options: SubmititOptions, name: str) -> dict[str, Any]:
    """Parameters of Submitit's executor."""
    given = {
        "name": name,
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem_gb": options.mem_gb,
        "timeout_min": options.time_minutes,
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_constraint": options.constraint,
        "slurm_signal_delay_s": options.warning_seconds,
        "slurm_additional_parameters": {"requeue": True},
        "slurm_srun_args": options.srun_arguments,
    }
    return {key: value for key, value in given.items() if value is not None}


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Check and submit."""
    given = sys.argv[1:] if arguments is None else arguments
    request = parse_arguments("submitit", "Run through Submitit.", SubmititOptions, given, sweeps=True)
    options = load_options("submitit", SubmititOptions, request)
    if request.multirun:
        from mome_dist.launchers.submitit import sweep

        if request.module != DEFAULT_MODULE:
            raise UserError(f"--multirun sweeps over trainings, not over {request.module}.")
        combined = sweep.combinations(request.arguments)
        if options.cpus_per_task is None:
            options.cpus_per_task = max(cores_of_rank(request.module, overrides) for overrides in combined)
        checked = [check_run(request, options, overrides) for overrides in combined]
        folder = sweep.new_folder()
        shared = sweep.pinned(request.arguments, combined, checked)
        command = sweep.hydra_arguments(options, shared, folder)
        if request.dry_run:
            print(shlex.join(["python", "-m", "mome_dist.launchers.submitit.sweep", *command]))
            for overrides in combined:
                print("  " + shlex.join(["python", "-m", request.module, *overrides]))
            return 0
        require_slurm()
        sweep.run_sweep(command)
        print(sweep.table(folder, combined))
        return 0
    request = dataclasses.replace(request, arguments=check_run(request, options, request.arguments))
    name = load_config(request.arguments).name if request.module == DEFAULT_MODULE else "mome"
    if request.dry_run:
        for key, value in [*parameters(options, name).items(), *options.variables.items()]:
            print(f"{key}: {value}")
        print(shlex.join(["python", "-m", request.module, *request.arguments]))
        return 0
    require_slurm()
    import submitit

    from mome_dist.launchers.submitit.task import RankTask

    executor = submitit.AutoExecutor(options.folder, cluster="slurm", slurm_max_num_timeout=options.max_timeouts)
    executor.update_parameters(**parameters(options, name))
    job = executor.submit(RankTask(request.module, tuple(request.arguments), options.max_tries, options.variables))
    print(f"submitted job {job.job_id}; logs: {options.folder}/{job.job_id}_N_log.out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
