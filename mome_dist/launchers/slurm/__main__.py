"""Submit a run to Slurm.

    mome-dist launch slurm launcher.nodes=2 launcher.tasks_per_node=8 launcher.gpus_per_node=8 train experiment=lrs3
    mome-dist launch slurm --dry-run launcher.nodes=2 train experiment=tiny
    mome-dist launch slurm launcher.tasks_per_node=8 evaluate runs/lrs3
    python -m launchers.slurm experiment=lrs3 launcher.nodes=2 launcher.tasks_per_node=8

The request is checked here, then ``slurm/train.sh`` (or ``slurm/eval.sh``) is given to sbatch. Run it in the root of
the checkout.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.launchers.options import DEFAULT_MODULE, Request, SlurmOptions, check_run, load_options, parse_arguments
from mome_dist.launchers.slurm.allocation import STEP_KEYS
from mome_dist.launchers.slurm.commands import require_slurm

_SCRIPTS = {DEFAULT_MODULE: "slurm/train.sh", "mome_dist.evaluate": "slurm/eval.sh"}


def sbatch_command(request: Request, options: SlurmOptions) -> list[str]:
    """The arguments of sbatch.

    Raises:
        UserError: for a module without a script, or outside of the checkout.
    """
    if request.module not in _SCRIPTS:
        raise UserError(f"--module {request.module}: choose from {', '.join(_SCRIPTS)}.")
    script = _SCRIPTS[request.module]
    if not Path(script).is_file():
        raise UserError(f"there is no {script} in {Path.cwd()}: run this in the root of the checkout.")
    given = {
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "mem": None if options.mem_gb is None else f"{options.mem_gb}G",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "time": options.time_minutes,
        "signal": f"B:USR1@{options.warning_seconds}",
    }
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    # What acts on the ranks goes with the script, which starts them.
    inside = [word for word in request.launcher if word.startswith(STEP_KEYS)]
    return ["sbatch", *flags, *options.extra, script, *inside, *request.arguments]


def job_environment(options: SlurmOptions) -> dict[str, str]:
    """Variables that the job gets besides those of this shell."""
    return {"MOME_DIST_PYTHON": sys.executable, "MAX_TRIES": str(options.max_tries), **options.variables}


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Check and submit; prints what sbatch says."""
    given = sys.argv[1:] if arguments is None else arguments
    request = parse_arguments("slurm", "Submit a run to Slurm.", SlurmOptions, given, sweeps=False)
    options = load_options("slurm", SlurmOptions, request)
    request = dataclasses.replace(request, arguments=check_run(request, options, request.arguments))
    command, variables = sbatch_command(request, options), job_environment(options)
    if request.dry_run:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return 0
    require_slurm()
    return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
