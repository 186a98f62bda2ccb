"""Break runs on purpose and prove that they survive.

    mome-dist drill --shrink experiment=tiny
    mome-dist drill --shrink --only kill --only hang experiment=tiny
    mome-dist drill --list

First an unbroken run of a few steps, then one for each fault, started again as `mome-dist launch --restarts` would. The
losses must equal those of the unbroken run (bit for bit where the number of processes is the same), and so must the
utterances of every step: nothing lost, nothing repeated. The exit code is 1 if any fault changed what was trained.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_overrides, command_parser, main_guard
from mome_dist.late_compilation import compile_when_called
from mome_dist.parallel.forked import compute_on_cpu
from mome_dist.quiet import quiet_libraries


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("drill", __doc__)
    parser.add_argument("--shrink", action="store_true", help="a small random LLM and a small synthetic corpus")
    parser.add_argument("--nproc", type=int, default=2, help="processes of a run")
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="this fault; may be repeated")
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed during a save")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of these kills")
    parser.add_argument("--list", action="store_true", help="print the names of the faults and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    add_overrides(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the drill and print a table; 1 if anything was lost."""
    options = command_line().parse_intermixed_args(arguments)
    compute_on_cpu()
    os.environ.update(HF_DEACTIVATE_ASYNC_LOAD="1", HF_HUB_OFFLINE="1")
    os.environ.update(GLOO_SOCKET_IFNAME="lo", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    quiet_libraries()
    compile_when_called()
    import torch

    from mome_dist.drills.cases import FAULTS
    from mome_dist.drills.command import drill_command

    if options.list:
        print("\n".join(FAULTS))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        return drill_command(options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
