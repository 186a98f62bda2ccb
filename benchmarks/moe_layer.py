"""The MoME layer by dispatch against DeepSpeed's, Megatron-Core's and transformers' MoE layers, forward and backward.

    python -m benchmarks.moe_layer                        bf16 hidden states, 1, 2 and 4 processes
    python -m benchmarks.moe_layer --precision fp32

Expert parallelism is over all processes. The table goes to benchmarks/results/ (see README.md beside this file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.layer_options import STOCK, TOP_K, add_case_options
from benchmarks.results import RESULTS, measure_worlds, table, write_results
from mome_dist.cli import main_guard

NARROW = 16  # bottlenecks up to this width are MoME's own kind
OURS = ("alltoall", "gather", "local")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_layer",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="worlds to measure, in turn")
    add_case_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    return parser.parse_args(arguments)


def speed_up(case: dict[str, Any], name: str) -> float:
    """How many times faster than DeepSpeed's layer a candidate is."""
    candidates = case["candidates"]
    return candidates[STOCK]["milliseconds"] / candidates[name]["milliseconds"]


def lead(case: dict[str, Any]) -> float:
    """How many times as fast as the fastest layer of others ``auto`` is, among those that were measured."""
    times = {name: candidate["milliseconds"] for name, candidate in case["candidates"].items()}
    return min(times[name] for name in times if name not in OURS) / times[case["auto"]]


def excess(case: dict[str, Any]) -> float:
    """What ``auto`` loses against the best dispatch, as a part of the best one's time."""
    times = {name: case["candidates"][name]["milliseconds"] for name in OURS if name in case["candidates"]}
    return times[case["auto"]] / min(times.values()) - 1


def render(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Sections of the result file: the summary, times, and bytes."""
    where = ["processes", "H", "b", "experts"]
    columns = [*where, "DeepSpeed", "alltoall", "gather / local", "`auto` takes", "times DeepSpeed's speed"]
    rows, bytes_rows = [], []
    for case in cases:
        candidates = case["candidates"]
        weights = "gather" if "gather" in candidates else "local"
        at = [str(case[key]) for key in ("processes", "hidden_size", "bottleneck", "experts")]
        times = [
            f"{candidates[name]['milliseconds']:.1f}"
            + (f" ({candidates[name]['predicted']:.1f})" if candidates[name]["predicted"] is not None else "")
            for name in (STOCK, "alltoall", weights)
        ]
        rows.append([*at, *times, case["auto"], f"{speed_up(case, case['auto']):.2f}"])
        if case["processes"] > 1:
            sent = [candidates[name]["bytes_sent"] / 1e6 for name in (STOCK, "alltoall", weights)]
            bytes_rows.append([*at, *(f"{each:.3f}" for each in sent), f"{sent[0] / sent[2]:.1f}"])
    first = cases[0]
    sections = [
        f"Hidden states {first['precision']}, parameters fp32, {first['tokens']} tokens a process, K = {TOP_K}, one "
        f"shared expert, expert parallelism over all processes; the busiest expert has "
        f"{min(case['imbalance'] for case in cases):.1f} to {max(case['imbalance'] for case in cases):.1f} times its "
        "share. All but Megatron-Core's, which has no biases, give the same output and gradients (checked before "
        "timing) and drop nothing.",
        "\n".join(f"- {line}" for line in summary(cases)),
        "## Milliseconds, forward and backward (in brackets what the cost model of `auto` predicts)",
        table(columns, rows),
    ]
    peers = sorted({name for case in cases for name in case["candidates"]} - {STOCK, *OURS})
    if peers:
        header = [*where[1:], "`auto`", *peers, "times the fastest other layer's speed"]
        sections += ["## One process, milliseconds beside other layers", table(header, _peer_rows(cases, peers))]
        sections += _reasons(cases)
    if bytes_rows:
        header = [*where, "DeepSpeed", "alltoall", "gather", "DeepSpeed / gather"]
        sections += ["## MB that a process sends, forward and backward", table(header, bytes_rows)]
    return sections


def _peer_rows(cases: Sequence[dict[str, Any]], peers: Sequence[str]) -> list[list[str]]:
    rows = []
    for case in (case for case in cases if case["processes"] == 1):
        times = {name: f"{candidate['milliseconds']:.1f}" for name, candidate in case["candidates"].items()}
        at = [str(case[key]) for key in ("hidden_size", "bottleneck", "experts")]
        rows.append([*at, times[case["auto"]], *(times.get(name, "-") for name in peers), f"{lead(case):.2f}"])
    return rows


def _reasons(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Why a layer was not measured somewhere."""
    told = sorted({f"- {name}: {why}" for case in cases for name, why in case["failed"].items()})
    return ["Where it says -, the copies of weights would exceed 1 GB, or:\n" + "\n".join(told)] if told else []


def summary(cases: Sequence[dict[str, Any]]) -> list[str]:
    """The figures that the project aims at, as sentences."""
    lines = []
    for what, chosen in (
        (f"bottlenecks of at most {NARROW}", [case for case in cases if case["bottleneck"] <= NARROW]),
        ("wider bottlenecks", [case for case in cases if case["bottleneck"] > NARROW]),
    ):
        if chosen:
            ratios = [speed_up(case, case["auto"]) for case in chosen]
            lines.append(f"{what}: `auto` is {min(ratios):.2f} to {max(ratios):.2f} times as fast as DeepSpeed's layer")
    leads = [lead(case) for case in cases if case["processes"] == 1]
    if leads:
        lines.append(f"one process: {min(leads):.2f} to {max(leads):.2f} times as fast as the fastest other layer")
    worst = max(cases, key=excess)
    lines.append(f"`auto` takes at most {excess(worst):.0%} longer than the best dispatch of each case")
    return lines


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    machine, cases = measure_worlds(
        "benchmarks.layer_ranks",
        options,
        ("tokens", "shapes", "precision", "rounds", "warm_up"),
    )
    given = sys.argv[1:] if arguments is None else arguments
    path = write_results(
        name=f"moe_layer_{options.precision}",
        title="MoME layer against DeepSpeed's MoE layer",
        command=" ".join(["python -m benchmarks.moe_layer", *given]),
        machine=machine,
        sections=render(cases),
        figures=cases,
        folder=options.results,
    )
    print(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
