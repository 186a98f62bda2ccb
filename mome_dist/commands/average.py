"""Average the newest checkpoints of a run into one, for decoding.

    mome-dist average runs/quickstart --last 2 averages/quickstart

The result is a checkpoint without an optimiser: `mome-dist evaluate OUT output=DIR`,
`mome-dist transcribe OUT FILE`, `mome-dist export OUT DIR` and `training.init_from=OUT` read it.
`mome-dist evaluate RUN select=average:N` does the same without writing it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.files import check_absent
from mome_dist.quiet import quiet_libraries
from mome_dist.trained import place_argument, run_of


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("average", __doc__)
    parser.add_argument("run", type=place_argument, help="run directory")
    parser.add_argument("target", type=Path, metavar="out", help="directory to make; it must not exist")
    parser.add_argument("--last", type=int, default=2, metavar="N", help="how many of the newest (default: 2)")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Average, and say what was written."""
    options = command_line().parse_args(arguments)
    run_of(options.run)
    check_absent(options.target, "an average")

    quiet_libraries()
    from rich.console import Console

    from mome_dist.checkpoint.average import write_average
    from mome_dist.checkpoint.saved import read_checkpoint
    from mome_dist.checkpoint.select import newest_checkpoints
    from mome_dist.progress import stages

    console = Console(highlight=False)
    with stages(console, f"averaging {options.last} checkpoints of {options.run}"):
        sources = [read_checkpoint(path) for path in newest_checkpoints(options.run, options.last)]
        mean = write_average(options.target, sources)
    steps = ", ".join(str(source.step) for source in sources)
    console.print(f"{options.target}: {mean.config.name}, mean of steps {steps}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
