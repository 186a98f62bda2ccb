"""The part of `benchmarks.train_step` that runs on every rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import rank_arguments
from mome_dist.quiet import quiet_libraries


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    parser.add_argument("--llm", type=Path, help="directory of the frozen LLM; without it, SmolLM2-135M in the cache")
    parser.add_argument("--experts", type=int, default=24, help="routed experts of a layer")
    parser.add_argument("--bottleneck", type=int, default=12, help="units of an expert")
    parser.add_argument("--clips", type=int, default=16, help="of a microbatch of a process")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the LLM")
    parser.add_argument("--rounds", type=int, default=9, help="turns of both forms; the median counts")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before them that do not count")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both forms and let rank 0 write the figures."""
    options = rank_arguments(__doc__, add_step_options, arguments)
    quiet_libraries()
    import torch

    from benchmarks.measuring import machine
    from benchmarks.step_parts import measure_steps
    from mome_dist.files import write_json
    from mome_dist.parallel.initialize import parallel_world
    from mome_dist.parallel.layout import Layout

    torch.set_num_threads(1)  # also a process alone: what differs between worlds is what travels
    ranks = int(os.environ["WORLD_SIZE"])
    layout = Layout.for_world(ranks, ep=ranks)
    with parallel_world(layout, 0, timeout_seconds=600):
        described = machine()
        figures = measure_steps(options, layout)
        if os.environ["RANK"] == "0":
            write_json(options.figures, {"machine": described, "cases": [figures]})


if __name__ == "__main__":
    main()
