"""The command line of the tuner."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mome_dist.config.deepspeed.file import deepspeed_of, write_deepspeed
from mome_dist.config.derived import encoder_sections, layout_of
from mome_dist.config.load import load_training
from mome_dist.config.models import settle_models
from mome_dist.config.values import check_values
from mome_dist.errors import UserError
from mome_dist.evaluation.style import save_figure
from mome_dist.files import write_json
from mome_dist.planning.command import cluster_of, job_of_options
from mome_dist.planning.hardware import cluster_of_gpus
from mome_dist.preflight import validate
from mome_dist.progress import stages
from mome_dist.tuning.report import figure_of, record_of, table_of
from mome_dist.tuning.search import Measured, tune
from mome_dist.tuning.space import Trial, hand_picked, neighbours, read_trials, refusal
from mome_dist.tuning.trial import ForkedRunner, LaunchedRunner, Runner

WIDTH = 140  # columns where there is no terminal to ask


def tune_command(options: argparse.Namespace, scratch: Path) -> None:
    """Search, print the table, write the best settings, the figure and everything measured.

    Raises:
        UserError: for a wrong configuration, or if no trial ran.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False)
    config = load_training(options.overrides)
    base = tuple(options.overrides)
    runner: Runner
    if options.shrink:
        from mome_dist.verification.probe import write_random_llama

        check_values(config)
        settle_models(config, encoder_sections(config), weights=False)
        deepspeed = deepspeed_of(config, layout_of(config, options.nproc).dp)
        llm = write_random_llama(scratch / "llm")
        runner = ForkedRunner(base, options.nproc, options.steps, options.timeout, llm)
        options.llm = str(llm)
    else:
        base = (*base, *settle_models(config))
        deepspeed = deepspeed_of(config, validate(config, options.nproc).dp)
        runner = LaunchedRunner(base, options.nproc, options.steps, options.timeout)
    cluster = cluster_of(options) if options.gpu or options.measured else None
    job = job_of_options(options, config, cluster or cluster_of_gpus("h100", 1, options.nproc))
    own = Trial(deepspeed.acts, {}, True)
    picked = [own, *hand_picked(config.data.fixed_accumulation)]
    picked += read_trials(options.trials) if options.trials else []
    with stages(console, "measuring"):

        def tell(one: Measured) -> None:
            said = one.failure or f"{one.median:.4f} s a step"
            console.print(f"  {one.trial.name}: {'not run: ' * one.pruned}{said}", soft_wrap=True)

        found = tune(
            picked,
            runner,
            lambda trial: refusal(trial, base, options.nproc, job, cluster),
            lambda best: neighbours(best, config, options.nproc, job, options.capacity_factors),
            options.rounds,
            options.most,
            tell,
        )
    if found is None:
        raise UserError("no trial ran to its end: run the job itself to see why (the lines above say what each met).")
    console.print(table_of(found))
    folder = options.out
    write_json(folder / "tuning.json", record_of(found))
    save_figure(figure_of(found), folder / "tuning.png")
    use = write_deepspeed(found.best.trial.deepspeed, options.write or folder / "best.json")
    console.print(f"best: {found.best.trial.name}, {found.best.final_median:.4f} s a step in the last round")
    if found.best_hand_picked is not None and found.best_hand_picked is not found.best:
        other = found.best_hand_picked
        console.print(f"best hand-picked: {other.trial.name}, {other.final_median:.4f} s in the same round")
    console.print(f"use it with: {' '.join([use, *found.best.trial.arguments()])}", soft_wrap=True)
