"""Look at every node of an allocation before training: versions, devices, clocks, shared storage, rates and links.

    mome-dist launch --nproc 4 check --write cluster.json

Every rank of the allocation runs it. What differs between nodes is named, and the exit code is 1. The JSON file is what
`mome-dist plan --measured` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("check", __doc__)
    parser.add_argument("--shared", type=Path, default=Path(), help="a folder that all nodes should see (this one)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write everything measured as JSON")
    parser.add_argument("--clock-limit", type=float, default=1.0, help="seconds by which clocks may differ (1)")
    parser.add_argument("--link-limit", type=float, default=0.5, help="a slower share of the usual is a problem (0.5)")
    parser.add_argument("--rate-limit", type=float, default=0.7, help="likewise for computing and memory (0.7)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds to wait for a rank (120)")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print and write; 1 if anything is wrong."""
    options = command_line().parse_args(arguments)
    from mome_dist.cluster.command import check_command

    return check_command(options)


if __name__ == "__main__":
    sys.exit(main())
