"""The noise source that a configuration or a command line names."""

from __future__ import annotations

from mome_dist.data.corpus import Corpus
from mome_dist.data.noise.babble import Babble
from mome_dist.data.noise.files import NoiseFiles
from mome_dist.data.noise.source import NoiseSource

BABBLE = "babble"


def open_noise(name: str, corpus: Corpus, split: str = "train", talkers: int = 8, seed: int = 0) -> NoiseSource:
    """Open a source.

    Args:
        name: "babble", or a directory of recordings.
        corpus, split, talkers: what babble is made from.
        seed: of either.

    Raises:
        UserError: see `Babble` and `NoiseFiles`.
    """
    return Babble(corpus, split, talkers, seed) if name == BABBLE else NoiseFiles(name, seed)
