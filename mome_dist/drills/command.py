"""The command line of the drills: which faults, and a table of what came of them."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mome_dist.drills.bench import SAVE_EVERY, STEPS, Bench
from mome_dist.drills.cases import all_cases
from mome_dist.drills.verdict import Verdict, run_case, unbroken
from mome_dist.errors import UserError
from mome_dist.files import write_json
from mome_dist.progress import stages

LOG_WIDTH = 130  # columns of the table where there is no terminal to ask
HEADINGS = ("fault", "exit codes", "restarts", "recovery s", "loss curve", "samples lost", "repeated", "verdict")


def drill_command(options: argparse.Namespace, scratch: Path) -> int:
    """Run the faults that the command line asks for, print the table, return the exit code.

    Raises:
        UserError: for a wrong configuration, or a fault that does not exist.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    bench = Bench.make(options.overrides, options.nproc, scratch, options.shrink)
    cases = all_cases(bench, options.kills, options.seed)
    if unknown := [name for name in options.only if name not in cases]:
        raise UserError(f"--only {unknown[0]}: no such fault; choose from {', '.join(cases)}.")
    chosen = options.only or list(cases)
    began, verdicts = time.monotonic(), []
    with stages(console, "the unbroken run") as show:
        plan = (f"training.steps={STEPS}", f"training.save_every={SAVE_EVERY}")
        reference = unbroken(bench, plan, scratch / "runs" / "unbroken", scratch / "cache")
        for number, name in enumerate(chosen, 1):
            show(f"fault {number} of {len(chosen)}: {name}")
            verdicts.append(run_case(bench, cases[name](), reference))
    console.print(_table(verdicts))
    failed = [verdict for verdict in verdicts if verdict.problems]
    for verdict in failed:
        console.print(f"[bold red]{verdict.name}[/]")
        for problem in verdict.problems:
            console.print(f"  {problem}", highlight=False, markup=False)
    console.print(
        f"{len(verdicts) - len(failed)} of {len(verdicts)} faults survived, {time.monotonic() - began:.0f} s",
        highlight=False,
    )
    if options.json is not None:
        write_json(options.json, [dataclasses.asdict(verdict) for verdict in verdicts])
    return 1 if failed else 0


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(title="fault drill")
    for heading in HEADINGS:
        table.add_column(heading)
    for verdict in verdicts:
        table.add_row(
            verdict.name,
            _codes(verdict.codes),
            str(verdict.restarts),
            "-" if verdict.recovery is None else f"{verdict.recovery:.1f}",
            "equal" if verdict.curve == 0 else f"{verdict.curve:.1e} off",
            str(verdict.lost),
            str(verdict.repeated),
            "[red]failed" if verdict.problems else "[green]survived",
        )
    return table


def _codes(codes: list[int]) -> str:
    """Such as ``137 x3, 0``."""
    groups: list[tuple[int, int]] = []
    for code in codes:
        if groups and groups[-1][0] == code:
            groups[-1] = (code, groups[-1][1] + 1)
        else:
            groups.append((code, 1))
    return ", ".join(f"{code} x{count}" if count > 1 else str(code) for code, count in groups)
