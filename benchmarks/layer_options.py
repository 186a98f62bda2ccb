"""The options of `benchmarks.moe_layer`, for its command and for its ranks."""

from __future__ import annotations

import argparse

STOCK, TOP_K = "deepspeed", 4
# SmolLM2-135M's and Llama 3.2's hidden sizes; MoME's own experts, and wide ones.
SHAPES = [*(f"{h}x{b}x{e}" for h in (576, 2048) for b in (12, 128) for e in (23, 64)), "3072x12x23"]


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    parser.add_argument("--tokens", type=int, default=704, help="of each process")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES,
        metavar="HxBxE",
        help="hidden size, units of an expert, routed experts (rounded up for expert parallelism)",
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the hidden states")
    parser.add_argument("--rounds", type=int, default=11, help="turns of every candidate; the median counts")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them that do not count")
