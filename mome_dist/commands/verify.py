"""Prove that parallel layouts train the same model as one process.

    mome-dist verify --shrink experiment=tiny
    mome-dist verify --shrink --only sp --only interleaved experiment=tiny mome.placement=layer
    mome-dist verify --nproc 4 experiment=quickstart parallel.tp=2 parallel.pp=2 llm.pad_heads=true

Each layout runs in real processes on this machine's CPU. Losses, the gradient norm, every gradient and every weight
after a few SGD and AdamW steps are compared with Hugging Face's model and torch's optimisers in one process. With
--nproc, the configuration's own layout is verified; without, a standard list of all axes. The exit code is 1 if
anything differs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, add_overrides, command_parser, main_guard
from mome_dist.config import load_config
from mome_dist.config.values import check_values
from mome_dist.late_compilation import compile_when_called
from mome_dist.parallel.forked import compute_on_cpu
from mome_dist.quiet import quiet_libraries


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("--shrink", action="store_true", help="a small random LLM and small modules: seconds a layout")
    parser.add_argument("--nproc", type=int, help="verify the configuration's own layout, on this many processes")
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this text")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), help="one optimiser instead of both")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of each run")
    add_overrides(parser)
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Verify and print a table; 1 if anything differs."""
    options = command_line().parse_intermixed_args(arguments)
    config = load_config(options.overrides)  # a mistake is told before torch is imported
    check_values(config)
    compute_on_cpu()
    os.environ.update(HF_DEACTIVATE_ASYNC_LOAD="1", HF_HUB_OFFLINE="1")
    quiet_libraries()
    compile_when_called()
    import torch

    from mome_dist.verification.command import verify_command

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        return verify_command(config, options, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
