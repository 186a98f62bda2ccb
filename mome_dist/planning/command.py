"""The command line of the planner: a table of the best plans, what the winner needs and why others are out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mome_dist.config.deepspeed.file import deepspeed_of, write_deepspeed
from mome_dist.config.derived import encoder_sections, streams_of
from mome_dist.config.load import load_config
from mome_dist.config.models import settle_models
from mome_dist.config.schema import RunConfig
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.planning.encoder_shapes import encoder_shape
from mome_dist.planning.hardware import Cluster, cluster_of_gpus
from mome_dist.planning.job import Candidate, Clip, Job, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.planning.measured import Check, checks_of, measured_cluster
from mome_dist.planning.search import Plan, Search, search, stage_memory
from mome_dist.planning.write import deepspeed_settings, layout_overrides, overrides, write_parallel

WIDTH = 140  # columns where there is no terminal to ask
GB = 1e9


def plan_command(options: argparse.Namespace, console: Console | None = None) -> None:
    """Search, print, and write what was asked for.

    Raises:
        UserError: for a wrong option or configuration, or if nothing fits.
    """
    config = load_config(options.overrides)
    check_values(config)
    own_llm = [] if options.llm else ["llm"]
    settle_models(config, [*own_llm, *encoder_sections(config)], weights=False)
    deepspeed_of(config)  # a plan brings its own settings, but a wrong file should not wait for the run
    cluster = cluster_of(options)
    job = job_of_options(options, config, cluster)
    checks = [] if options.measured is None else checks_of(options.measured)
    found = search(job, cluster)
    winner = found.plans[0].candidate
    layout, deepspeed = layout_overrides(winner), f"deepspeed=zero{winner.zero}"
    if options.write_parallel:
        heading = f"{winner.layout.describe()}; planned for {cluster.name}."
        layout = write_parallel(winner, options.write_parallel, heading)
    if options.write_deepspeed:
        deepspeed = write_deepspeed(deepspeed_settings(winner), options.write_deepspeed)
    if options.json:
        print(json.dumps(_record(job, cluster, checks, found, options.top), indent=2))
    else:
        use = " ".join([*layout, deepspeed, *overrides(winner)])
        _print(job, cluster, checks, found, options.top, use, console or _console())


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the options name.

    Raises:
        UserError: if they name none, or a wrong one.
    """
    for name in ("nodes", "ranks_per_node"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1.")
    if options.measured is not None:
        return measured_cluster(options.measured, options.nodes, options.ranks_per_node)
    if options.gpu is None:
        raise UserError("name the machine: --gpu NAME (public figures), or --measured FILE of mome-dist check.")
    return cluster_of_gpus(options.gpu, options.nodes or 1, options.ranks_per_node or 8)


def job_of_options(options: argparse.Namespace, config: RunConfig, cluster: Cluster) -> Job:
    """The job of a configuration, its LLM maybe known by name only."""
    clip = Clip(options.seconds, options.text_tokens, options.prompt_tokens)
    widths = {stream: encoder_shape(config, stream).width for stream in streams_of(config)}
    shape = find_shape(options.llm or config.llm.path)
    return job_of(config, shape, clip, widths, cluster.on_gpu, cluster.fast_precision)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=WIDTH, highlight=False)


def _print(
    job: Job, cluster: Cluster, checks: Sequence[Check], found: Search, top: int, use: str, console: Console
) -> None:
    console.print(
        f"{job.frozen_parameters / 1e9:.2f} billion frozen parameters ({job.precision}), "
        f"{job.trained_parameters / 1e6:.0f} million trained; a step of {job.batch_size} utterances in "
        f"{job.views_per_step} of {len(job.lengths)} views of {min(job.lengths)} to {max(job.lengths)} tokens"
    )
    console.print(f"encoders in a step: {_encoders(job)}", soft_wrap=True)
    console.print(f"{cluster.name}: {cluster.memory / GB:.1f} GB a rank may be used")
    for check in checks:
        console.print(f"  measured there, {check}", soft_wrap=True)
    table = Table(title=f"the fastest of {len(found.plans)} layouts that fit")
    rows = [_row(plan, job) for plan in distinct(found.plans)[:top]]
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("dispatch", "sp", "recompute") else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    best = found.plans[0]
    _print_memory(job, cluster, best, console)
    _print_time(best, console)
    if found.rejections:
        console.print("out:")
        for rejection in found.rejections:
            console.print(f"  {rejection.count} x {rejection.reason}; e.g. {rejection.example}", soft_wrap=True)
    console.print(f"run it with: {use}", soft_wrap=True)


def _encoders(job: Job) -> str:
    told = [
        f"{encoder.shape.name} ({encoder.shape.parameters / 1e6:.0f} million parameters, {encoder.precision}"
        + (", with LoRA)" if encoder.lora_parameters else ")")
        for encoder in job.encoders
    ]
    return ", ".join(told) or "none, features are cached"


def command_overrides(candidate: Candidate) -> list[str]:
    """Everything that a plan sets, as Hydra overrides without files."""
    return [*layout_overrides(candidate), f"deepspeed=zero{candidate.zero}", *overrides(candidate)]


def distinct(plans: tuple[Plan, ...]) -> list[Plan]:
    """The best plan of every layout: settings that change little would fill the table."""
    seen: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        layout = plan.candidate.layout
        seen.setdefault((layout.tp, layout.pp, layout.ep, plan.candidate.dispatch), plan)
    return list(seen.values())


def _row(plan: Plan, job: Job) -> dict[str, str]:
    """What is told of a plan, by column; of experts only where there are any."""
    candidate, layout = plan.candidate, plan.candidate.layout
    row = {
        "tp": str(layout.tp),
        "pp": str(layout.pp),
        "dp": str(layout.dp),
        "ep": str(layout.ep),
        "zero": str(candidate.zero),
        "dispatch": candidate.dispatch,
        "sp": "yes" if layout.sequence_parallel else "no",
        "recompute": layout.recompute,
        "accum.": str(candidate.accumulation),
        "clips": str(candidate.utterances(job)),
        "GB": f"{plan.memory.total / GB:.1f}",
        "s a step": f"{plan.time.total:.3f}",
    }
    return row if job.spread else {name: value for name, value in row.items() if name not in ("ep", "dispatch")}


def _print_memory(job: Job, cluster: Cluster, plan: Plan, console: Console) -> None:
    stages = sorted({0, plan.candidate.layout.pp - 1})
    needs = [stage_memory(job, plan.candidate, cluster, stage) for stage in stages]
    names = ["only stage"] if len(stages) == 1 else ["first stage", "last stage"]
    table = Table(title="memory of a rank of the fastest, GB")
    for heading in ("", *needs[0].parts(), "total"):
        table.add_column(heading, justify="right")
    for name, need in zip(names, needs, strict=True):
        table.add_row(name, *(f"{value / GB:.2f}" for value in (*need.parts().values(), need.total)))
    console.print(table)


def _print_time(plan: Plan, console: Console) -> None:
    table = Table(title="seconds of its step")
    for heading in (*plan.time.parts(), "total"):
        table.add_column(heading.replace("_", " "), justify="right")
    table.add_row(*(f"{value:.3f}" for value in (*plan.time.parts().values(), plan.time.total)))
    console.print(table)


def _record(job: Job, cluster: Cluster, checks: Sequence[Check], found: Search, top: int) -> dict[str, Any]:
    return {
        "cluster": asdict(cluster),
        "checks": [asdict(check) | {"error": check.error} for check in checks],
        "job": asdict(job),
        "plans": [
            {
                "candidate": asdict(plan.candidate),
                "memory_bytes": {**plan.memory.parts(), "total": plan.memory.total},
                "seconds": {**plan.time.parts(), "total": plan.time.total},
                "deepspeed": deepspeed_settings(plan.candidate),
                "overrides": command_overrides(plan.candidate),
            }
            for plan in distinct(found.plans)[:top]
        ],
        "rejections": [asdict(rejection) for rejection in found.rejections],
    }


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the machine."""
    parser.add_argument("--gpu", help="a GPU with public figures, such as h100")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="JSON of mome-dist check or benchmarks.gpu")
    parser.add_argument("--nodes", type=int, help="nodes (1, or as measured)")
    parser.add_argument("--ranks-per-node", type=int, help="GPUs or processes of a node (8, or as measured)")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what the configuration does not: the LLM by name, and the size of utterances."""
    parser.add_argument("--llm", help="an LLM by name or directory, instead of the configuration's")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a long utterance: memory follows it")
    parser.add_argument("--text-tokens", type=int, default=32, help="of its transcript")
    parser.add_argument("--prompt-tokens", type=int, default=12, help="of the prompt")
