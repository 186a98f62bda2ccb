"""Both encoders on a GPU in fp32, TF32 and bf16: how far from float64 and how fast; and the log-mel spectrogram.

    python -m benchmarks.gpu.encoders                  shapes of Whisper medium and AV-HuBERT large

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

NAMES = {"audio": "Whisper medium", "video": "AV-HuBERT large"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    return parser_of("encoders", __doc__, rounds=5, warm_up=1).parse_args(arguments)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """Speed and error of bf16 against fp32, and where the spectrogram is fast."""
    lines = [
        f"- {NAMES[stream]}: bf16 is {each['fp32']['milliseconds'] / each['bf16']['milliseconds']:.2f} times as fast "
        f"as fp32, its error {each['bf16']['error']:.1e}"
        for stream, each in figures["encoders"].items()
    ]
    sound = figures["spectrogram"]
    places = ", ".join(f"{sound[where]:.2f} ms on the {where}" for where in ("host", "device") if where in sound)
    apart = f"; they differ by {sound['difference']:.1e}" if "difference" in sound else ""
    return [*lines, f"- log-mel spectrogram of {figures['clips']} clips: {places}{apart}"]


def render(figures: Mapping[str, Any]) -> list[str]:
    """Sections of the result file."""
    rows = []
    for stream, precisions in figures["encoders"].items():
        slowest = precisions["fp32"]["milliseconds"]
        rows += [
            [
                NAMES[stream],
                name,
                f"{each['error']:.1e}",
                f"{each['milliseconds']:.2f}",
                f"{each['host']:.2f}",
                f"{slowest / each['milliseconds']:.2f}",
            ]
            for name, each in precisions.items()
        ]
    return [
        f"{figures['clips']} clips of {figures['seconds']:g} s at once, random weights of the encoders' shapes. The "
        "error is the norm of the difference from the same encoder in float64, over the norm of its features. Times of "
        "Whisper are without its spectrogram, which training makes on the device.",
        table(["encoder", "precision", "error", "ms", "host ms", "times fp32's speed"], rows),
    ]


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    run("encoders", "Encoders on a GPU", options, arguments, summary, render)


if __name__ == "__main__":
    sys.exit(main())
