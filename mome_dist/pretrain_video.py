"""Command: pre-train the video encoder on the visemes of a corpus.

    mome-dist pretrain video
    mome-dist launch --nproc 2 pretrain video --corpus DIR --out DIR

By default the corpus is the synthetic one and the result goes into the cache. Runs alone or, started by a launcher,
on several processes that train one model together. Does nothing when ``--out`` already holds an encoder made with the
same settings from the same corpus.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mome_dist.artefact import check_replaceable, is_current, manifest_sha256, publish, read_record
from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.data.corpus import Corpus
from mome_dist.data.synthetic import SyntheticSettings, default_corpus_dir
from mome_dist.paths import cache_root
from mome_dist.training.pretraining_settings import VisemeSettings, checked_arguments
from mome_dist.training.step_progress import step_progress

if TYPE_CHECKING:
    from mome_dist.parallel.plain_world import World

DEFAULTS = VisemeSettings()


def pretrain(
    corpus_directory: Path, out: Path, settings: VisemeSettings, world: World, held_out: str = "validation"
) -> float:
    """Make the encoder in ``out`` unless it is there; return its frame accuracy on the ``held_out`` split.

    Raises:
        UserError: the corpus or the settings do not fit, or ``out`` holds something else.
    """
    from mome_dist.speech.video_encoder import VideoEncoderConfig
    from mome_dist.training.viseme_pretraining import ClipCache, VisemeTrainer

    corpus = Corpus.open(corpus_directory)
    config = VideoEncoderConfig()
    identity = {
        "task": "visemes",
        "corpus_sha256": manifest_sha256(corpus_directory),
        "held_out": held_out,
        "encoder": asdict(config),
        **asdict(settings),
    }
    console = Console(quiet=world.rank > 0)
    if world.agree(is_current(out, identity)):
        accuracy = float((read_record(out) or {})["results"]["accuracy"])
        console.print(f"{out} is up to date: viseme accuracy {accuracy:.3f} on {held_out}.")
        return accuracy
    check_replaceable(out)

    started = time.monotonic()
    clips = ClipCache(corpus)
    trainer = VisemeTrainer(clips, clips.classes, corpus.split("train"), settings, world, config)
    with step_progress("visemes", settings.steps, console) as report:
        encoder = trainer.train(report)
    accuracy = trainer.accuracy(corpus.split(held_out))
    results = {"accuracy": accuracy, "seconds": round(time.monotonic() - started, 1), "processes": world.size}
    if world.rank == 0:
        with publish(out, identity, results) as directory:
            encoder.save_pretrained(directory, {"geometry": corpus.geometry})
    world.barrier()
    console.print(f"Viseme accuracy {accuracy:.3f} on {held_out} after {results['seconds']:.0f} s; saved in {out}.")
    return accuracy


def command_line() -> Parser:
    """Its options."""
    parser = command_parser("pretrain video", __doc__)
    corpus = default_corpus_dir(SyntheticSettings())
    parser.add_argument("--corpus", type=Path, default=corpus, help="corpus directory with visemes in its metadata")
    out = cache_root() / "encoders" / "visemes"
    parser.add_argument("--out", type=Path, default=out, help="directory of the encoder to make")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="of training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size, help="clips a step, over all processes")
    parser.add_argument(
        "--group-size", type=int, default=DEFAULTS.group_size, help="clips that share BatchNorm statistics"
    )
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--held-out", default="validation", help="split on which accuracy is measured")
    return parser


def check_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `mome_dist.training.pretraining_settings.checked_arguments`."""
    return checked_arguments(command_line(), arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = check_arguments(arguments)
    settings = VisemeSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        group_size=options.group_size,
        seed=options.seed,
        bf16=options.bf16,
    )
    from mome_dist.parallel.plain_world import open_world

    with open_world() as world:
        pretrain(options.corpus, options.out, settings, world, options.held_out)


if __name__ == "__main__":
    sys.exit(main())
