"""Decoding on a GPU, greedy and with beams, with MoME and without; and whether it writes what a CPU writes.

    python -m benchmarks.gpu.decode                    shapes of Llama 3.2-3B

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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = parser_of("decode", __doc__, rounds=2, warm_up=1)
    parser.add_argument("--tokens", type=int, default=24, help="that are written of each clip")
    parser.add_argument(
        "--static-cache", action="store_true", help="also with decoding.static_cache, whose compilation takes minutes"
    )
    return parser.parse_args(arguments)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """Whether texts are those of a CPU, and what MoME adds to each search."""
    equal, clips = (sum(each[key] for each in figures["parity"]) for key in ("equal", "clips"))
    added = [
        f"{longer:+.0%} ({each['clips']} clips, {each['beams']} beams)"
        for each, longer in _longer(figures)
        if longer is not None and each["model"] == "with MoME"
    ]
    return [
        target(
            equal == clips, "in fp32, the device writes the tokens that the CPU writes", f"{equal} of {clips} clips"
        ),
        f"- MoME adds to decoding {', '.join(added)}",
    ]


def _longer(figures: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float | None]]:
    """Each measured search, and by which part it is longer than the one of the LLM alone; None for that itself."""
    plain = {(each["clips"], each["beams"]): each for each in figures["speed"] if each["model"] == "LLM"}
    return [
        (each, None if each["model"] == "LLM" else each["milliseconds"] / base["milliseconds"] - 1)
        for each in figures["speed"]
        for base in [plain[each["clips"], each["beams"]]]
    ]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = [
        [
            str(each["clips"]),
            str(each["beams"]),
            each["model"],
            f"{each['milliseconds']:.1f}",
            f"{each['milliseconds'] / figures['tokens']:.2f}",
            f"{each['tokens a second']:,.0f}",
            "" if longer is None else f"{longer:+.1%}",
        ]
        for each, longer in _longer(figures)
    ]
    return [
        f"{figures['tokens']} tokens a clip, the LLM in bf16, random weights, the finest view. Texts are compared on a "
        "small model, greedy and with 5 beams, in every view.",
        table(["clips", "beams", "model", "ms", "ms a token", "tokens/s", "against the LLM"], rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    run("decode", "Decoding on a GPU", options, arguments, summary, render)


if __name__ == "__main__":
    sys.exit(main())
