"""A Hydra sweep as one job array: each combination of values is a job, with a run directory of its own.

hydra-submitit-launcher submits the array; every rank of every job calls `train_one`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from mome_dist.config.load import register_resolvers, unreadable
from mome_dist.errors import UserError
from mome_dist.launchers.options import DEFAULT_MODULE, SubmititOptions
from mome_dist.paths import configs_dir
from mome_dist.training_log import Ends, TrainingLog


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of a sweep, in Hydra's order: ``a=1,2 b=3`` -> ``a=1 b=3``, ``a=2 b=3``.

    Raises:
        UserError: for a value that is not written as Hydra reads it.
    """
    choices = []
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(unreadable(error.override)) from error
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            assert override.input_line is not None
            choices.append([override.input_line])
    return [list(combination) for combination in itertools.product(*choices)]


def pinned(overrides: Sequence[str], combined: Sequence[Sequence[str]], checked: Sequence[Sequence[str]]) -> list[str]:
    """The overrides of a sweep with what its checks have added: the commits of models of the hub.

    Args:
        combined: `combinations` of the overrides.
        checked: each of them, as its ranks are to be given it.

    Raises:
        UserError: models differ between the combinations, and are named without their commits.
    """
    added = [list(after[len(before) :]) for before, after in zip(combined, checked, strict=True)]
    if all(more == added[0] for more in added):
        return [*overrides, *added[0]]
    for before, more in zip(combined, added, strict=True):
        if unnamed := [word for word in more if word not in before]:
            raise UserError(f"a sweep over models of the hub has to name their commits: write {' '.join(unnamed)}.")
    return list(overrides)


def hydra_arguments(options: SubmititOptions, overrides: Sequence[str], folder: Path) -> list[str]:
    """Arguments of Hydra's command line for a sweep into ``folder``/0, 1, ..."""
    given = {
        "submitit_folder": options.folder,
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem_gb": options.mem_gb,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "timeout_min": options.time_minutes,
        "signal_delay_s": options.warning_seconds,
        "max_num_timeout": options.max_timeouts,
        "array_parallelism": options.parallel_jobs,
        "name": "mome-sweep",
    }
    launcher = [f"hydra.launcher.{key}={value}" for key, value in given.items() if value is not None]
    return [
        "--multirun",
        *overrides,
        "hydra/launcher=submitit_slurm",
        *launcher,
        f"+hydra.launcher.srun_args=[{','.join(map(_quoted, options.srun_arguments))}]",
        f"+hydra.job.env_set.MAX_TRIES='{options.max_tries}'",
        *(f"+hydra.job.env_set.{name}={_quoted(value)}" for name, value in options.variables.items()),
        f"hydra.sweep.dir={folder}",
        "hydra.sweep.subdir=${hydra:job.num}",
    ]


def _quoted(text: str) -> str:
    """A string as Hydra's command line reads it, whatever is in it."""
    return QuotedString(text, Quote.single).with_quotes()


def new_folder() -> Path:
    """A directory for a sweep, named by the time."""
    return Path("runs/sweeps") / f"{datetime.now():%Y%m%d-%H%M%S}"


def run_sweep(arguments: Sequence[str]) -> None:
    """Submit the array and wait for all its jobs.

    Args:
        arguments: `hydra_arguments`.

    Raises:
        UserError: one of them failed; the others have ended too.
    """
    register_resolvers()
    main = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="config")(train_one)
    sys.argv = ["launchers.submitit", *arguments]
    main()


def train_one(config: DictConfig) -> None:
    """One rank of one job of the array; the command line of the job becomes that of a training."""
    from mome_dist.launchers.submitit.rank import run_rank

    job = HydraConfig.get()
    overrides = [*job.overrides.task, f"output_dir={job.runtime.output_dir}"]
    run_rank(DEFAULT_MODULE, overrides, int(os.environ["MAX_TRIES"]))


def table(folder: Path, combined: Sequence[Sequence[str]]) -> str:
    """The mean loss of the last steps of every run of a sweep, with the values that tell them apart."""
    shared = set.intersection(*map(set, combined))
    rows = []
    for number, overrides in enumerate(combined):
        told = " ".join(word for word in overrides if word not in shared)
        rows.append(f"{folder / str(number)}  {told}  {_last_loss(folder / str(number))}")
    return "\n".join(rows)


def _last_loss(run: Path) -> str:
    steps, losses = TrainingLog.read(run / "metrics.jsonl").series("loss")
    if not len(losses):
        return "no step"
    ends = Ends.of(losses)
    return f"step {int(steps[-1])}: loss {ends.last:.4f} (mean of the last {ends.window})"
