"""Find the fastest layout of a training job that fits a cluster, before anything is started.

    mome-dist plan --gpu h100 --nodes 8 --llm llama-3.1-70b mome.routed_experts=64 data.batch_size=512
    mome-dist plan --measured cluster.json experiment=quickstart
    mome-dist plan --gpu a100-80gb --nodes 2 --llm llama-3.1-8b mome.routed_experts=32 \\
        --write-parallel configs/parallel/planned.yaml --write-deepspeed configs/deepspeed/planned.json

Memory and time of every division of the ranks are predicted; the table lists the fastest ones that fit, then what the
winner's memory and time consist of, and why other layouts are out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_overrides, command_parser, main_guard
from mome_dist.planning.command import add_cluster_options, add_job_options, plan_command


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("plan", __doc__)
    add_cluster_options(parser)
    add_job_options(parser)
    parser.add_argument("--top", type=int, default=8, help="layouts to list")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--write-parallel", type=Path, metavar="YAML", help="write the winner for configs/parallel")
    parser.add_argument("--write-deepspeed", type=Path, metavar="JSON", help="write its DeepSpeed configuration")
    add_overrides(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    plan_command(command_line().parse_intermixed_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
