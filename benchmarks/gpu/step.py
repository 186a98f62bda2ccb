"""A training step of the paper's job on one GPU: the frozen LLM alone, with MoME, with MoME and the encoders.

    python -m benchmarks.gpu.step                      one GPU of 80 GB or more
    python -m benchmarks.gpu.step --device cpu --tiny --results rehearsal
    python -m benchmarks.gpu.step --predict            measures nothing: new predictions for what was measured before

Shapes are those of Llama 3.2-3B, Whisper medium and AV-HuBERT large; weights and clips are random, made on the machine.
The table goes to benchmarks/results/ (see benchmarks/README.md), and `tools/plan_layout.py --measured` reads its JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.command import parser_of, publish, run, target
from benchmarks.results import table
from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from mome_dist.planning.measured import Check

NAME, TITLE = "step", "A training step on a GPU"
LEAST_MFU, MOST_MOME = 0.25, 0.06


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = parser_of(NAME, __doc__, rounds=5, warm_up=0)  # each form has had its first steps by then
    parser.add_argument("--graphs", action="store_true", help="also with MoME and llm.graphs=cuda")
    parser.add_argument("--predict", action="store_true", help="only predict anew, for what --results holds measured")
    return parser.parse_args(arguments)


def utilisation(figures: Mapping[str, Any], case: Mapping[str, Any]) -> float | None:
    """Model FLOPs utilisation: FLOPs that a step needs over those of the GPU's published bf16 peak in its time."""
    peak, needed = figures["peak flops"], sum(case["predicted"]["flops"].values())
    return None if peak is None else needed / (case["step"] / 1e3) / peak


def added_by_mome(figures: Mapping[str, Any]) -> float:
    """The part of a step with MoME, its features cached, by which it is longer than the one without."""
    plain, mome, _ = (case["step"] for case in figures["cases"].values())
    return (mome - plain) / mome


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The aims, judged, and the error of the plan."""
    *_, whole = figures["cases"].values()
    on_gpu = figures["cluster"]["device"] == "cuda"
    mfu, mome = utilisation(figures, whole), added_by_mome(figures)
    return [
        target(
            None if mfu is None else mfu >= LEAST_MFU,
            f"MFU at least {LEAST_MFU:.0%} with the real router and encoders",
            "no published peak" if mfu is None else f"{mfu:.1%}",
        ),
        target(mome <= MOST_MOME if on_gpu else None, f"MoME at most {MOST_MOME:.0%} of a step", f"{mome:.1%}"),
        *(f"- planned, {Check(**each)}" for each in figures["planned"]),
    ]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    job = figures["job"]
    rows, parts = [], []
    for form, case in {**figures["cases"], **figures["graphed"]}.items():
        used = utilisation(figures, case)
        rows.append(
            [
                form,
                f"{case['step']:.1f}",
                f"{case['least']:.1f} - {case['most']:.1f}",
                f"{case['host']:.1f}",
                f"{case['busy']:.1f}",
                str(case["kernels"]),
                f"{case['tokens'] / case['step'] * 1e3:,.0f}",
                "-" if used is None else f"{used:.1%}",
                f"{case['predicted']['seconds'] * 1e3:.1f}",
                "-" if case["bytes"] is None else f"{case['bytes'] / 1e9:.2f}",
                f"{case['predicted']['bytes'] / 1e9:.2f}",
            ]
        )
        parts.append([form, *(f"{case['milliseconds'][part]:.1f}" for part in case["milliseconds"])])
    columns = ["step", "ms", "range", "host ms", "busy ms", "kernels", "tokens/s", "MFU", "planner's ms"]
    columns += ["GB", "planner's GB"]
    rates = figures["cluster"]["rates"]
    about = (
        f"{job['clips']} clips of {job['seconds']:g} s in four AVSR views, one behind the other; MoME as in "
        f"`{' '.join(job['overrides'])}`, AdamW, ZeRO 1, one process. `ms` is until the last kernel ends, `host` until "
        "Python goes on, `busy` the time in which a kernel ran, from a trace of one step. FLOPs of MFU are those that "
        "a step needs (`mome_dist/planning/flops.py`): frozen products twice, chosen and shared experts and the router "
        "three times, encoders once; the peak is the GPU's published one of dense bf16 products. GB are tensors at the "
        "fullest moment."
    )
    measured = (
        f"Rates measured here, which the predictions rest on: {rates['bf16_flops'] / 1e12:.3g} TFLOP/s in bf16, "
        f"{rates['fp32_flops'] / 1e12:.3g} in fp32, {rates['memory_bytes'] / 1e12:.3g} TB/s, "
        f"{rates['call'] * 1e6:.1f} us a call."
    )
    names = list(next(iter(figures["cases"].values()))["milliseconds"])
    return [
        about,
        measured,
        table(columns, rows),
        "## Milliseconds of the parts",
        table(["step", *names], parts),
    ]


def _predict(options: argparse.Namespace) -> None:
    """Write today's predictions beside what was measured.

    Raises:
        UserError: if nothing was.
    """
    from benchmarks.gpu.models import PAPER, TINY
    from benchmarks.gpu.predictions import predictions, step_checks

    path = options.results / f"gpu_{NAME}.json"
    if not path.is_file():
        raise UserError(f"--predict: {path} does not exist: measure on a GPU first, or set --results.")
    stored = json.loads(path.read_text(encoding="utf-8"))
    figures = stored["figures"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"tiny": TINY, "paper": PAPER}[figures["sizes"]]
        found = predictions(sizes, figures["cluster"], Path(folder))
    for form, case in figures["cases"].items():
        case["predicted"] = found[form]
    for case in figures["graphed"].values():
        case["predicted"] = found["with MoME"]
    figures["planned"] = step_checks(figures["cases"])
    publish(NAME, TITLE, stored["command"], stored["machine"], figures, summary, render, options)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    if options.predict:
        _predict(options)
    else:
        run(NAME, TITLE, options, arguments, summary, render)


if __name__ == "__main__":
    sys.exit(main())
