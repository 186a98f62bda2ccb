"""The options of `benchmarks.routers`, for its command and for its ranks."""

from __future__ import annotations

import argparse

from mome_dist.moe.routers.registry import ROUTERS

OURS, TOP_K = "top_k", 4


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    parser.add_argument("--tokens", type=int, default=704, help="of each process")
    parser.add_argument("--shape", default="2048x12x23", metavar="HxBxE", help="as in benchmarks.moe_layer")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the hidden states")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=[*ROUTERS], help=f"beside {OURS}")
    parser.add_argument("--rounds", type=int, default=21, help="turns of every router; the median counts")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them that do not count")
