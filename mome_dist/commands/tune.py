"""Find the DeepSpeed settings that make a job's steps shortest, by running it for a few steps in each.

    mome-dist tune --nproc 2 experiment=quickstart
    mome-dist tune --shrink --nproc 2 experiment=tiny
    mome-dist tune --nproc 8 --gpu h100 --trials mine.json --write configs/deepspeed/tuned.json ...

Twelve usual settings, your own file's and those of --trials are measured first, then single changes to the best of
them: ZeRO stage, bucket size, overlap, microbatches, expert-parallel size, capacity factor. Settings that cannot fit
are left out; one that crashes or runs out of memory is noted, and the search goes on. The best is a plain DeepSpeed
JSON file.
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
from mome_dist.planning.command import add_cluster_options, add_job_options
from mome_dist.quiet import quiet_libraries


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("tune", __doc__)
    parser.add_argument("--nproc", type=int, required=True, help="processes of the job")
    parser.add_argument("--shrink", action="store_true", help="a small random model: a second a trial, on the CPU")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run that count")
    parser.add_argument("--rounds", type=int, default=2, help="runs of every trial, and of the finalists once more")
    parser.add_argument("--most", type=int, default=40, help="trials to run at most")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a trial is ended")
    parser.add_argument("--trials", type=Path, metavar="FILE", help="JSON list of further settings to start from")
    parser.add_argument(
        "--capacity-factors", type=float, nargs="+", default=[], help="to try; they change what is trained"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"), help="folder of table, figure and best.json")
    parser.add_argument("--write", type=Path, metavar="JSON", help="write the best settings there instead")
    add_cluster_options(parser)
    add_job_options(parser)
    add_overrides(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = command_line().parse_intermixed_args(arguments)
    if options.shrink:
        compute_on_cpu()
        os.environ["HF_HUB_OFFLINE"] = "1"
        quiet_libraries()
        compile_when_called()
        import torch

        import mome_dist.tuning.forked  # noqa: F401  imported once here, inherited by every fork

        torch.set_num_threads(1)
    from mome_dist.tuning.command import tune_command

    with tempfile.TemporaryDirectory() as scratch:
        tune_command(options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
