"""Make a corpus of LRS3, LRS2 or a data set of your own: find the mouth, crop it, cut long clips, write shards.

    mome-dist prepare lrs3 /data/lrs3 corpora/lrs3
    mome-dist prepare lrs2 /data/lrs2 corpora/lrs2 --workers 32
    mome-dist prepare manifests corpora/mine --root /data/mine --train train.csv --test test.tsv

A killed preparation continues where it was. Several machines share one with --part I/N, or as a Slurm job array
(slurm/prepare.sh); whoever does the last portion joins all. Clips that cannot be used are left out and listed with the
reason in OUT/rejected.jsonl. The last line printed is the directory of the corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.data.preparation.clips import SPLITS
from mome_dist.data.preparation.command import Request, part_of, prepare_command
from mome_dist.data.preparation.settings import PreparationSettings
from mome_dist.errors import UserError
from mome_dist.speech.geometry import GEOMETRIES

DEFAULTS = PreparationSettings("lrs3")


def command_line() -> Parser:
    """Its arguments and options."""
    parser = command_parser("prepare", __doc__)
    sources = parser.add_subparsers(dest="source", required=True)
    for name, what in (("lrs3", "LRS3, as its owners hand it out"), ("lrs2", "LRS2, likewise")):
        tree = sources.add_parser(name, help=what, description=__doc__, formatter_class=parser.formatter_class)
        tree.add_argument("root", type=Path, help="folder of the data set")
        _add_options(tree)
    lists = sources.add_parser(
        "manifests",
        help="lists: auto_avsr's .csv, av_hubert's .tsv, lhotse's .jsonl or .jsonl.gz",
        description=__doc__,
        formatter_class=parser.formatter_class,
    )
    _add_options(lists)
    lists.add_argument(
        "--root", type=Path, help="folder that the lists' paths are below (default: as the lists have it)"
    )
    for split in SPLITS:
        lists.add_argument(f"--{split}", type=Path, metavar="LIST", help=f"list of the {split} split")
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="directory of the corpus")
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: {cores})")
    parser.add_argument(
        "--part", metavar="I/N", help="do one of N parts (default: as a Slurm job array has it, or all)"
    )
    parser.add_argument("--merge", action="store_true", help="prepare nothing, join what is done")
    for name, kind, what in (
        ("validation_share", float, "of the clips, held out by speaker where there is no validation split; 0: none"),
        ("longest_seconds", float, "of an utterance; longer clips are cut where the times of their words are known"),
        ("longest_test_seconds", float, "of a test utterance, which is never cut"),
        ("tolerance_seconds", float, "by how much sound and picture may differ in length"),
        ("longest_gap", int, "frames in a row that may lack a face"),
        ("least_faces", float, "share of an utterance's frames that must show a face"),
        ("geometry", str, f"of mouths in their crops, and of crops that are given: {' or '.join(GEOMETRIES)}"),
        ("clips_per_shard", int, "clips that go into one shard"),
        ("limit", int, "clips of each split to prepare, for a trial"),
    ):
        default = getattr(DEFAULTS, name)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=what + shown)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = command_line().parse_args(arguments)
    settings = PreparationSettings(**{field.name: getattr(options, field.name) for field in fields(DEFAULTS)})
    lists = {split: path for split in SPLITS if (path := getattr(options, split, None)) is not None}
    if settings.source == "manifests" and not lists:
        raise UserError("no list is given: add --train LIST, --validation LIST or --test LIST")
    part = part_of(options.part, os.environ)
    request = Request(options.root, options.out, lists, settings, options.workers, part, options.merge)
    prepare_command(request, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
