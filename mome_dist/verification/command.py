"""The command line of the verification: which cases, and a table of what was found."""

from __future__ import annotations

import argparse
import dataclasses
import time
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mome_dist.config import RunConfig
from mome_dist.config.deepspeed.file import DeepSpeedSettings, deepspeed_of
from mome_dist.config.derived import check_llm_terms, layout_of, lora_of, router_of
from mome_dist.config.models import settle_models
from mome_dist.errors import UserError
from mome_dist.llm.division import check_division
from mome_dist.llm.shape import LLMShape
from mome_dist.preflight import check_experts
from mome_dist.progress import stages
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.compare import BF16_TOLERANCE, TOLERANCE, explain
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.run import Case
from mome_dist.verification.verify import OPTIMIZERS, Verdict, Verifier

LOG_WIDTH = 140  # columns of the table where there is no terminal to ask
KINDS = ("loss", "gradient norm", "gradient", "weight")


def verify_command(config: RunConfig, options: argparse.Namespace, scratch: Path) -> int:
    """Run the cases that the command line asks for, print the table, return the exit code.

    Args:
        config: the overrides', with its values checked.
        options: of the command line.
        scratch: a folder for what is made small.

    Raises:
        UserError: for a wrong configuration, or a choice without cases.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    deepspeed = deepspeed_of(config, layout_of(config, options.nproc).dp if options.nproc else None)
    console.print(deepspeed.describe(), highlight=False, soft_wrap=True)
    if options.shrink:
        config = shrunk(config, scratch / "llm")
    settle_models(config, ["llm"])
    beside = config.mome.placed or config.llm.lora is not None or bool(lora_of(config))
    standard = standard_cases(config.mome.spread > 0, beside, router_of(config).settings)
    if options.nproc:
        check_experts(config, layout_of(config, options.nproc))
    cases = [_own_case(config, options.nproc, deepspeed)] if options.nproc else standard
    cases = [dataclasses.replace(case, deepspeed=deepspeed.acts) for case in cases]
    cases = [case for case in cases if not options.only or any(text in case.name for text in options.only)]
    if not cases:
        raise UserError(f"--only {options.only}: no case has such a name; without --only all are run.")
    shape = LLMShape.from_directory(config.llm.path)
    for case in cases:
        check_division(shape, case.layout, config.mome.spread, config.llm.pad_heads)
        check_llm_terms(config, case.layout, shape)
    optimizers = [options.optimizer] if options.optimizer else list(OPTIMIZERS)
    began = time.monotonic()
    verdicts: list[Verdict] = []
    table = Table(title="largest relative errors")
    for heading in ("layout", "processes", "optimiser", *KINDS, "verdict"):
        table.add_column(heading, no_wrap=heading != "layout")
    with stages(console, "starting") as show:
        verifier = Verifier(Probe(config, options.steps))
        for case, optimizer in product(cases, optimizers):
            show(f"run {len(verdicts) + 1} of {len(cases) * len(optimizers)}: {case.name}, {optimizer}")
            verdicts.append(verifier.check(case, optimizer))
            table.add_row(*_row(verdicts[-1], config))
    console.print(table)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    for verdict in failed:
        _explain(verdict, config, console)
    console.print(
        f"{len(verdicts) - len(failed)} of {len(verdicts)} runs equal one process within {TOLERANCE:g} (bf16: "
        f"{BF16_TOLERANCE:g}); {len(cases)} layouts, {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _own_case(config: RunConfig, world_size: int, deepspeed: DeepSpeedSettings) -> Case:
    layout = layout_of(config, world_size)
    dispatch = config.mome.dispatch
    if dispatch == "auto":  # chosen by speed at the start of a run; both forms are in the standard list
        dispatch = "gather" if layout.ep > 1 else "local"
    return Case(layout.describe(), layout, deepspeed.stage, dispatch)


def _row(verdict: Verdict, config: RunConfig) -> list[str]:
    case, comparison = verdict.case, verdict.comparison
    told = config.mome.spread > 0 and case.dispatch not in case.name
    name = f"{case.name} ({case.dispatch})" if told else case.name
    head = [name, str(case.layout.world_size), verdict.optimizer]
    if comparison is None:
        return [*head, *["-"] * len(KINDS), "[red]failed"]
    errors = [f"{comparison.errors[kind]:.1e}" for kind in KINDS]
    mismatch = verdict.worst
    if mismatch is None:
        return [*head, *errors, "[green]equal"]
    return [*head, *errors, f"[red]{explain(mismatch.ratio, case.layout, _microbatches(config))}"]


def _explain(verdict: Verdict, config: RunConfig, console: Console) -> None:
    console.print(f"[bold red]{verdict.case.name}, {verdict.optimizer}[/]")
    if verdict.failure:
        console.print(f"  {verdict.failure}", highlight=False, markup=False)
    for mismatch in verdict.comparison.mismatches[:5] if verdict.comparison else ():
        ratio = explain(mismatch.ratio, verdict.case.layout, _microbatches(config))
        console.print(
            f"  {mismatch.what} {mismatch.name}: {mismatch.error:.1e} off, ratio {ratio}", highlight=False, markup=False
        )


def _microbatches(config: RunConfig) -> int:
    return config.data.fixed_accumulation
