"""Rewrite a checkpoint for another layout or format, in one process, without the LLM.

    mome-dist reshard runs/tiny runs/tiny_native --format deepspeed --pp 2 --ep 2 --dp 2 --zero 1
    mome-dist reshard runs/tiny_native runs/again/checkpoints/step-000100 --tp 2 --ep 4 --dp 4
    mome-dist reshard runs/tiny_native exports/tiny --format hf

SRC is a checkpoint, a run (its newest checkpoint is taken) or a DeepSpeed checkpoint. DST must not
exist; it appears when all of it is written and its content hash is that of SRC. ``--format hf`` is the export of
mome-dist export: weights without the optimiser, of no layout; nothing can be made of it but inference.
DeepSpeed's zero_to_fp32 and ds_to_universal stop at checkpoints with experts; ``--format hf`` is the way to weights.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.quiet import quiet_libraries
from mome_dist.trained import find_trained, place_argument


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("reshard", __doc__)
    parser.add_argument("source", type=place_argument, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--format", choices=("canonical", "deepspeed", "hf"), default="canonical", help="of DST")
    for axis in ("tp", "pp", "ep", "dp", "virtual"):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"parallel.{axis} of the ranks that DST is for")
    parser.add_argument("--stage-layers", type=int, nargs="+", help="parallel.stage_layers of these ranks")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=1, help="ZeRO stage that DST is for")
    parser.add_argument("--config", type=Path, help="config.yaml of the run, if an engine itself saved SRC")
    return parser


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Reshard and say what was done."""
    options = command_line().parse_args(arguments)
    if not options.source.exists():
        find_trained(options.source)  # what there is instead is told before torch is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    logging.disable(logging.WARNING)
    from rich.console import Console

    from mome_dist.checkpoint.reshard import reshard
    from mome_dist.parallel.layout import Layout
    from mome_dist.progress import BYTES, progress, stages

    layout = Layout.for_world(
        options.tp * options.pp * options.dp,
        options.tp,
        options.pp,
        options.ep,
        options.virtual,
        stage_layers=options.stage_layers,
    )
    if options.format == "hf":
        from mome_dist.export.adapter import export_checkpoint  # loads what the model needs to decode

        with stages(Console(stderr=True), f"exporting {options.source}"):
            export_checkpoint(options.source, options.target, options.config)
        print(f"{options.target}: weights without the optimiser")
        return
    with progress(Console(stderr=True), f"writing {options.target.name}", unit=BYTES) as shown:
        outcome = reshard(
            options.source,
            options.target,
            options.format,
            layout,
            options.zero,
            options.config,
            lambda done, total: shown.update(done, total=total),
        )
    for note in outcome.notes:
        print(f"note: {note}")
    print(f"source content {outcome.source_content}")
    print(f"target content {outcome.target_content}")
    speed = outcome.written / outcome.seconds / 1e9
    print(
        f"{outcome.written / 1e9:.3f} GB in {outcome.seconds:.1f} s, {speed:.2f} GB/s: "
        f"{options.target} ({options.format}, {layout.describe()}, ZeRO {options.zero})"
    )
    if options.format == "deepspeed":
        others = "; zero_to_fp32 and ds_to_universal stop at experts" if outcome.experts else ""
        print(f"weights alone: --format hf of {options.target}{others}")


if __name__ == "__main__":
    sys.exit(main())
