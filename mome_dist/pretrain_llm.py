"""Command: pre-train the tiny LLM on the texts of a corpus.

    mome-dist pretrain llm
    mome-dist launch --nproc 2 pretrain llm --corpus DIR --out DIR

By default the corpus is the synthetic one and the result goes into the cache. Runs alone or, started by a launcher,
on several processes that train one model together. Does nothing when ``--out`` already holds an LLM made with the
same settings from the same corpus. ``--out`` becomes a plain Hugging Face directory.
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
from mome_dist.training.pretraining_settings import CopySettings, checked_arguments
from mome_dist.training.step_progress import step_progress

if TYPE_CHECKING:
    from mome_dist.parallel.plain_world import World

DEFAULTS = CopySettings()


def pretrain(
    corpus_directory: Path, out: Path, settings: CopySettings, world: World, held_out: str = "validation"
) -> float:
    """Make the LLM in ``out`` unless it is there; return its token accuracy on noisy ``held_out`` sentences.

    Raises:
        UserError: the corpus or the settings do not fit, or ``out`` holds something else.
    """
    from mome_dist.llm.tiny import save_llm, tiny_llama, word_tokenizer
    from mome_dist.training.copy_pretraining import CopyTask, CopyTrainer

    corpus = Corpus.open(corpus_directory)
    identity = {
        "task": "copy",
        "corpus_sha256": manifest_sha256(corpus_directory),
        "held_out": held_out,
        **asdict(settings),
    }
    console = Console(quiet=world.rank > 0)
    if world.agree(is_current(out, identity)):
        accuracy = float((read_record(out) or {})["results"]["accuracy"])
        console.print(f"{out} is up to date: token accuracy {accuracy:.3f} on {held_out}.")
        return accuracy
    check_replaceable(out)

    started = time.monotonic()
    splits = {"train", held_out, *corpus.split_names}
    texts = {name: [utterance.text for utterance in corpus.split(name)] for name in splits}
    unseen = [text for name in sorted(texts) if name != "train" for text in texts[name]]
    # Every word of the corpus gets a token; sentences outside the training split serve for nothing else.
    tokenizer = word_tokenizer([*texts["train"], *unseen])
    model = tiny_llama(tokenizer, seed=settings.seed)
    trainer = CopyTrainer(model, CopyTask(tokenizer, texts["train"], held_out=unseen), settings, world)
    with step_progress("tiny LLM", settings.steps, console) as report:
        trainer.train(report)
    accuracy = trainer.accuracy(CopyTask(tokenizer, texts[held_out], splice_share=0.0))
    results = {"accuracy": accuracy, "seconds": round(time.monotonic() - started, 1), "processes": world.size}
    if world.rank == 0:
        with publish(out, identity, results) as directory:
            save_llm(model, tokenizer, directory)
    world.barrier()
    console.print(f"Token accuracy {accuracy:.3f} on {held_out} after {results['seconds']:.0f} s; saved in {out}.")
    return accuracy


def command_line() -> Parser:
    """Its options."""
    parser = command_parser("pretrain llm", __doc__)
    corpus = default_corpus_dir(SyntheticSettings())
    parser.add_argument("--corpus", type=Path, default=corpus, help="corpus directory; only its texts are used")
    out = cache_root() / "llms" / "tiny"
    parser.add_argument("--out", type=Path, default=out, help="directory of the LLM to make")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps, help="of training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size, help="rows a step, over all processes")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed)
    parser.add_argument("--held-out", default="validation", help="split on which accuracy is measured")
    return parser


def check_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `mome_dist.training.pretraining_settings.checked_arguments`."""
    return checked_arguments(command_line(), arguments)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = check_arguments(arguments)
    settings = CopySettings(steps=options.steps, batch_size=options.batch_size, seed=options.seed)
    from mome_dist.parallel.plain_world import open_world

    with open_world() as world:
        pretrain(options.corpus, options.out, settings, world, options.held_out)


if __name__ == "__main__":
    sys.exit(main())
