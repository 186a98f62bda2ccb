"""Where the time of training steps goes on a GPU: kernels that take most, and why nothing runs in between.

    python -m benchmarks.gpu.profile                   a step with MoME and encoders, as benchmarks.gpu.step has it
    python -m benchmarks.gpu.profile --trace           and the whole trace, for chrome://tracing

The table goes to benchmarks/results/ (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.command import parser_of, run
from benchmarks.results import table
from mome_dist.cli import main_guard

SHOWN, NAME_WIDTH = 25, 90  # kernels of the table; templates have names of many lines


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = parser_of("profile", __doc__, rounds=2, warm_up=0)
    parser.add_argument("--trace", action="store_true", help="keep the trace as gpu_profile_trace.json in --results")
    return parser.parse_args(arguments)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """How long a step is, how many kernels it has, and how long none runs."""
    span, steps = figures["span"], figures["steps"]
    late = f", {figures['host share']:.1%} because Python has not asked for the next kernel yet"
    return [
        f"- a step: {span / steps * 1e3:.1f} ms in the trace, {figures['step'] * 1e3:.1f} ms without one (the best)",
        f"- nothing runs {figures['idle share']:.1%} of the time{late if figures['device'] == 'cuda' else ''}",
        f"- kernels and copies: {sum(each['calls'] for each in figures['kernels']) / steps:,.0f} a step",
    ]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    kernels, span, steps = figures["kernels"], figures["span"], figures["steps"]
    shown, rest = kernels[:SHOWN], kernels[SHOWN:]
    if rest:
        others = {key: sum(each[key] for each in rest) for key in ("calls", "seconds")}
        shown = [*shown, {"name": f"{len(rest)} others", **others}]
    rows = [
        [
            each["name"][:NAME_WIDTH].replace("|", "\\|"),
            f"{each['calls'] / steps:.0f}",
            f"{each['seconds'] / steps * 1e3:.2f}",
            f"{each['seconds'] / span:.1%}",
        ]
        for each in shown
    ]
    return ["What takes most:", table(["kernel", "a step", "ms a step", "of the time"], rows)]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    run("profile", "Where a training step goes on a GPU", options, arguments, summary, render)


if __name__ == "__main__":
    sys.exit(main())
