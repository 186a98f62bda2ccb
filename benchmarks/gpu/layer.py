"""The MoME layer on a GPU against DeepSpeed's, Megatron-Core's and two products alone, forward and backward.

    python -m benchmarks.gpu.layer                     one GPU
    python -m benchmarks.gpu.layer --device cpu --tiny --results rehearsal

The table goes to benchmarks/results/ (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.command import parser_of, run, target
from benchmarks.results import table
from mome_dist.cli import main_guard

OURS, STOCK = ("local", "alltoall"), "deepspeed"
TIMES_DEEPSPEED, TIMES_FLOOR, DIFFERENCE = 3.0, 2.0, 3e-2


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = parser_of("layer", __doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of a pass")
    parser.add_argument("--passes", type=int, default=10, help="of a timing, one behind the other")
    return parser.parse_args(arguments)


def best(case: Mapping[str, Any]) -> str:
    """Our fastest dispatch."""
    return min(OURS, key=lambda name: case["candidates"][name]["milliseconds"])


def ratios(case: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast as DeepSpeed's layer ours is, and how many times as long as its floor it takes."""
    from benchmarks.gpu.layer_work import FLOOR_OF

    found, name = case["candidates"], best(case)
    mine, floor = found[name], found[FLOOR_OF[name]]
    return {
        "deepspeed": found[STOCK]["milliseconds"] / mine["milliseconds"],
        "floor": mine["milliseconds"] / floor["milliseconds"],
        "busy floor": mine["busy"] / floor["busy"],
    }


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The aims, judged."""
    on_gpu = figures["cluster"]["device"] == "cuda"
    lines = []
    for case in figures["cases"]:
        found, size = ratios(case), f"{_size(case)} (`{best(case)}`)"
        lines += [
            target(
                found["deepspeed"] >= TIMES_DEEPSPEED if on_gpu else None,
                f"{size}: at least {TIMES_DEEPSPEED:g} times as fast as DeepSpeed's layer",
                f"{found['deepspeed']:.2f}",
            ),
            target(
                found["floor"] <= TIMES_FLOOR if on_gpu else None,
                f"{size}: at most {TIMES_FLOOR:g} times its floor",
                f"{found['floor']:.2f} (of kernels alone {found['busy floor']:.2f})",
            ),
        ]
    errors = [
        error
        for case in figures["cases"]
        for each in case["candidates"].values()
        for error in (each["differs"] or {}).values()
    ]
    what = f"our outputs and gradients within {DIFFERENCE:g} of DeepSpeed's, of the largest value"
    return [*lines, target(max(errors) <= DIFFERENCE, what, f"{max(errors):.1e}")]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file: a table of each size."""
    about = (
        "Hidden states bf16; parameters fp32 (DeepSpeed's and ours) or bf16 (Megatron-Core's and the products). K = 4, "
        f"one shared expert. {figures['cases'][0]['passes']} passes, one behind the other, make a timing; `ms` is "
        "until the last kernel ends, `host` until Python has asked for it, `busy` the time in which a kernel ran, from "
        "a trace. A floor has as many units as the form that it stands under computes for a token: `local` all "
        "experts, `alltoall` the chosen ones and the shared one. Megatron-Core's experts run one after the other, for "
        "its grouped products need Transformer Engine."
    )
    sections = [about]
    for case in figures["cases"]:
        sections += [f"## {_size(case)}, {case['tokens']} tokens", _table(case)]
        sections += [f"Does not run here: {name} ({' '.join(why.split())})." for name, why in case["failed"].items()]
    return sections


def _size(case: Mapping[str, Any]) -> str:
    return f"H {case['hidden_size']}, {case['experts']} experts of {case['bottleneck']} units"


def _table(case: Mapping[str, Any]) -> str:
    base = case["candidates"][best(case)]["milliseconds"]
    rows = [
        [
            name,
            f"{each['milliseconds']:.3f}",
            f"{each['least']:.3f} - {each['most']:.3f}",
            f"{each['milliseconds'] / base:.2f}",
            f"{each['host']:.3f}",
            f"{each['busy']:.3f}",
            f"{each['kernels']:.0f}",
            "" if each["predicted"] is None else f"{each['predicted']:.3f}",
        ]
        for name, each in case["candidates"].items()
    ]
    columns = ["layer", "ms", "range", "of our best", "host", "busy", "kernels", "planner's ms"]
    return table(columns, rows)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    run("layer", "MoME layer on a GPU", options, arguments, summary, render)


if __name__ == "__main__":
    sys.exit(main())
