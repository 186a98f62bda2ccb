"""Every form of an expert beside MoME's on the same layer: forward and backward, with each dispatch.

    python -m benchmarks.forms                            bf16 hidden states, 1 and 2 processes
    python -m benchmarks.forms --forms latent linear

Expert parallelism is over all processes. The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.form_options import CASES, OURS, add_case_options
from benchmarks.results import RESULTS, measure_worlds, table, write_results
from mome_dist.cli import main_guard


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forms",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to measure, in turn")
    add_case_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def render(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Sections of the result file: what was measured, the times, and what travels."""
    first = cases[0]
    named = [f"{case['dispatch']}, {case['processes']}" for case in cases]
    names = list(dict.fromkeys(name for case in cases for name in case["forms"]))
    times = [[f"`{name}`", _sizes(name), *(_time(case["forms"], name) for case in cases)] for name in names]
    several = [case for case in cases if case["processes"] > 1]
    sections = [
        f"One layer forward and backward, hidden states {first['precision']} of {first['hidden']}, {first['tokens']} "
        "tokens a process, MoME's router, one shared expert. Of the routed experts: how many there are, how many a "
        f"token uses, and their units. In brackets the time beside `{OURS}`'s. Columns are the dispatch and the number "
        "of processes.",
        "## Milliseconds",
        table(["form", "experts/K of units", *named], times),
    ]
    if several:
        sent = [[f"`{name}`", *(_sent(case["forms"], name) for case in several)] for name in names]
        columns = ["form", *(f"{case['dispatch']}, {case['processes']}" for case in several)]
        sections += ["## Megabytes that a process sends, forward and backward", table(columns, sent)]
    return sections


def _sizes(name: str) -> str:
    case = CASES[name]
    units = case.bottleneck if case.rule == "equal" else f"1 to {2 * case.bottleneck - 1}"
    return f"{case.experts}/{case.top_k} of {units}"


def _time(forms: dict[str, Any], name: str) -> str:
    if name not in forms:
        return "-"
    milliseconds, ours = forms[name]["milliseconds"], forms[OURS]["milliseconds"]
    return f"{milliseconds:.2f} ({milliseconds / ours:.2f})"


def _sent(forms: dict[str, Any], name: str) -> str:
    return f"{forms[name]['bytes'] / 1e6:.3f}" if name in forms else "-"


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    machine, cases = measure_worlds(
        "benchmarks.form_ranks", options, ("tokens", "hidden", "precision", "forms", "rounds", "warm_up")
    )
    given = sys.argv[1:] if arguments is None else arguments
    path = write_results(
        name="forms",
        title="Forms of an expert beside MoME's",
        command=" ".join(["python -m benchmarks.forms", *given]),
        machine=machine,
        sections=render(cases),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
