"""What MoME costs: a training step with it against the same step with projectors only, on the frozen SmolLM2-135M.

In one process also against what plain transformers and PEFT take for the same clips and views.

    python -m benchmarks.train_step            1 process, and 2 that share the experts

The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, measure_worlds, table, write_results
from benchmarks.step_ranks import add_step_options
from mome_dist.assets import asset_dir
from mome_dist.cli import main_guard


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="worlds to measure, in turn")
    add_step_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def times_peft(case: dict[str, Any]) -> float:
    """How many times as fast as transformers with PEFT a step with MoME is."""
    return case["peer"]["milliseconds"] / case["milliseconds"]["mome"]["step"]


def render(cases: Sequence[dict[str, Any]], llm: str, options: argparse.Namespace) -> list[str]:
    """Sections of the result file: the summary and the table."""
    columns = ["processes", "part of a step", "projectors only", "with MoME", "MoME adds", "of the step"]
    rows, summary = [], []
    for case in cases:
        processes = case["processes"]
        plain, mome = case["milliseconds"]["projectors"], case["milliseconds"]["mome"]
        for part in plain:
            added = mome[part] - plain[part]
            times = [f"{plain[part]:.0f}", f"{mome[part]:.0f}", f"{added:+.0f}", f"{added / plain['step']:+.1%}"]
            rows.append([str(processes), part, *times])
        summary.append(f"- {processes} process(es): MoME makes a step {mome['step'] / plain['step'] - 1:.1%} longer")
        if peer := case["peer"]:
            summary.append(
                f"- {processes} process(es): with MoME, a step is {times_peft(case):.2f} times as fast as one of "
                f"transformers with PEFT (LoRA on Q and V, {peer['trained parameters']:,} parameters with its "
                f"projectors), which takes {peer['milliseconds']:.0f} ms"
            )
    parameters = cases[0]["trained parameters"]
    tokens = " and ".join(f"{count} tokens in {view}" for view, count in cases[0]["tokens"].items())
    return [
        f"{llm}, frozen, {options.precision}. MoME beside the feed-forward network of every layer: {options.experts} "
        f"routed experts of {options.bottleneck} units and a shared one, K = 4; `local` in one process, `gather` in "
        f"more. ZeRO 1, AdamW. Each process has one thread and one microbatch a step, of {options.clips} clips: "
        f"{tokens}. One process trains {parameters['projectors']:,} parameters without MoME and "
        f"{parameters['mome']:,} with it.",
        "\n".join(summary),
        "## Milliseconds; forward and backward without MoME are the LLM's and the projectors'",
        table(columns, rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    options.llm = options.llm or asset_dir("smollm2-135m")
    machine, cases = measure_worlds(
        "benchmarks.step_ranks", options, ("llm", "experts", "bottleneck", "clips", "precision", "rounds", "warm_up")
    )
    path = write_results(
        name="train_step",
        title="What MoME adds to a training step",
        command=" ".join(["python -m benchmarks.train_step", *given]),
        machine=machine,
        sections=render(cases, options.llm.name, options),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
