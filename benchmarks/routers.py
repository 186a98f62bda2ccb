"""Every router beside MoME's on the same layer: forward and backward, with each dispatch.

    python -m benchmarks.routers                          bf16 hidden states, 1 and 2 processes
    python -m benchmarks.routers --routers top_k cosine

Expert parallelism is over all processes. The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, measure_worlds, table, write_results
from benchmarks.router_options import OURS, TOP_K, add_case_options
from mome_dist.cli import main_guard


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routers",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to measure, in turn")
    add_case_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def render(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Sections of the result file: what was measured, and the times."""
    first = cases[0]
    columns = ["router", "experts a token", *(f"{case['dispatch']}, {case['processes']}" for case in cases)]
    rows = []
    used = {name: found["used"] for case in cases for name, found in case["routers"].items()}
    for name in used:  # not every dispatch serves every router
        rows.append([f"`{name}`", f"{used[name]:.2f}", *(_cell(case["routers"], name) for case in cases)])
    hidden_size, bottleneck, experts = first["shape"]
    return [
        f"One layer forward and backward, hidden states {first['precision']} of {hidden_size}, {first['tokens']} "
        f"tokens a process, {experts} routed experts of {bottleneck} units and a shared one, at most {TOP_K} a token "
        "(of `null_experts` twice as many choices, of which half are real in the mean; of `grin` two; of `gw_moe` and "
        f"`expert_choice` any number). In brackets the time beside `{OURS}`'s. Columns are the dispatch and the number "
        "of processes.",
        "## Milliseconds",
        table(columns, rows),
    ]


def _cell(routers: dict[str, Any], name: str) -> str:
    if name not in routers:
        return "-"
    milliseconds, ours = routers[name]["milliseconds"], routers[OURS]["milliseconds"]
    return f"{milliseconds:.2f} ({milliseconds / ours:.2f})"


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    keys = ("tokens", "shape", "precision", "routers", "rounds", "warm_up")
    machine, cases = measure_worlds("benchmarks.router_ranks", options, keys)
    given = sys.argv[1:] if arguments is None else arguments
    path = write_results(
        name="routers",
        title="Routers beside MoME's",
        command=" ".join(["python -m benchmarks.routers", *given]),
        machine=machine,
        sections=render(cases),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
