"""Synthetic audio-visual speech: a command grammar, a speech synthesiser with phone timings, and a rendered mouth.

It stands in for licensed corpora wherever a real, learnable task is needed that anyone may have: text, sound and lip
movements agree, so that speech can be read from either, and visemes are known for every frame.
"""

from mome_dist.config.synthetic import SyntheticSettings, default_corpus_dir
from mome_dist.data.synthetic.generate import generate_corpus

__all__ = ["SyntheticSettings", "default_corpus_dir", "generate_corpus"]
