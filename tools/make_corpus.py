"""Make the synthetic audio-visual corpus of the quickstart, or find it where it was made before.

    python tools/make_corpus.py

Prints the corpus directory, its figures and the speed. A second run with the same settings reuses the corpus at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mome_dist.data.corpus import Corpus
from mome_dist.data.synthetic import SyntheticSettings, default_corpus_dir, generate_corpus
from mome_dist.errors import UserError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = SyntheticSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to make (default: in the cache, named after the settings)")
    for split in ("train", "validation", "test"):
        number = defaults.utterances(split)
        parser.add_argument(f"--{split}", type=int, default=number, help=f"{split} utterances (default: {number})")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="everything is drawn from it (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--backend", choices=("auto", "flite", "espeak"), default="auto", help="speech synthesiser")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the corpus; return the exit code."""
    options = parse_arguments(arguments)
    settings = SyntheticSettings(
        train=options.train,
        validation=options.validation,
        test=options.test,
        seed=options.seed,
        backend=options.backend,
    )
    directory = options.out or default_corpus_dir(settings)
    reused = directory.exists()
    start = time.perf_counter()
    generate_corpus(settings, directory, options.workers)
    elapsed = time.perf_counter() - start

    corpus = Corpus.open(directory)
    total = 0
    for name in corpus.split_names:
        entry = corpus.manifest["splits"][name]
        speakers = len({utterance.speaker for utterance in corpus.split(name)})
        print(f"{name:<11}{entry['utterances']:>6} utterances {entry['seconds'] / 3600:>7.3f} h {speakers:>3} speakers")
        total += entry["utterances"]
    if reused:
        print("reused: a corpus of the same settings was there")
    else:
        speed = total / elapsed / options.workers
        print(f"made in {elapsed:.1f} s: {speed:.1f} utterances/s a worker, {options.workers} worker(s)")
    print(directory)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
