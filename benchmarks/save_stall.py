"""How long training waits for a checkpoint: written between two steps, or beside them (`training.async_save`).

    python -m benchmarks.save_stall            1 process, and 2 that share the experts

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, measure_worlds, table, write_results
from benchmarks.save_ranks import FORMS
from benchmarks.step_ranks import add_step_options
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.save_stall",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to measure, in turn")
    add_step_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def render(cases: Sequence[dict[str, Any]], llm: str, precision: str) -> list[str]:
    """Sections of the result file."""
    rows = [
        [str(case["processes"]), f"{case['bytes'] / 1e6:.0f}", form, f"{case['wait'][form]:.0f}", f"{both:.0f}", change]
        for case in cases
        for form in FORMS
        for both in [case["two steps"][form]]
        for change in [f"{both / case['two steps'][FORMS[0]] - 1:+.1%}"]
    ]
    columns = ["processes", "MB", "checkpoint", "ms until training goes on", "ms of two steps", "against none"]
    return [
        f"{llm}, frozen, {precision}, MoME in every layer, AdamW, ZeRO 1: two training steps with a checkpoint between "
        "them. Weights and both moments are written, hashed, flushed to disk and published.",
        table(columns, rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    options.llm = options.llm or asset_dir("smollm2-135m")
    machine, cases = measure_worlds(
        "benchmarks.save_ranks", options, ("llm", "experts", "bottleneck", "clips", "precision", "rounds", "warm_up")
    )
    path = write_results(
        name="save_stall",
        title="How long training waits for a checkpoint",
        command=" ".join(["python -m benchmarks.save_stall", *given]),
        machine=machine,
        sections=render(cases, options.llm.name, options.precision),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
