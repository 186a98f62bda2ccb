"""Make the synthetic audio-visual corpus of the quickstart, or find it where it was made before.

    mome-dist prepare synthetic                     into the cache, under a name that follows from the settings
    mome-dist prepare synthetic --train 200 --out /data/small

Prints the corpus's figures and speed, and its directory as the last line. A second run with the same settings reuses
the corpus at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mome_dist.cli import Parser, command_parser, main_guard
from mome_dist.data.corpus import Corpus
from mome_dist.data.synthetic import SyntheticSettings, default_corpus_dir, generate_corpus


def command_line() -> Parser:
    """Its arguments and options."""
    defaults = SyntheticSettings()
    parser = command_parser("prepare synthetic", __doc__)
    parser.add_argument("--out", type=Path, help="directory to make; without it, one in the cache")
    for split in ("train", "validation", "test"):
        parser.add_argument(
            f"--{split}", type=int, default=defaults.utterances(split), help=f"{split} utterances (%(default)s)"
        )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="everything is drawn from it (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument(
        "--backend", choices=("auto", "flite", "espeak"), default="auto", help="synthesiser (%(default)s)"
    )
    return parser


def print_figures(corpus: Corpus) -> int:
    """Print a line a split; return the number of utterances."""
    total = 0
    for name in corpus.split_names:
        entry = corpus.manifest["splits"][name]
        speakers = len({utterance.speaker for utterance in corpus.split(name)})
        print(f"{name:<11}{entry['utterances']:>6} utterances {entry['seconds'] / 3600:>7.3f} h {speakers:>3} speakers")
        total += entry["utterances"]
    return total


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = command_line().parse_args(arguments)
    settings = SyntheticSettings(
        train=options.train,
        validation=options.validation,
        test=options.test,
        seed=options.seed,
        backend=options.backend,
    )
    directory = options.out or default_corpus_dir(settings)
    reused = directory.exists()
    began = time.monotonic()
    generate_corpus(settings, directory, options.workers)
    seconds = time.monotonic() - began
    utterances = print_figures(Corpus.open(directory))
    if reused:
        print("reused: a corpus of the same settings was there")
    else:
        speed = utterances / seconds / options.workers
        print(f"made in {seconds:.1f} s by {options.workers} worker(s): {speed:.1f} utterances/s each")
    print(directory)


if __name__ == "__main__":
    raise SystemExit(main())
