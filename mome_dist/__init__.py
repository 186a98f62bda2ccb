"""Distributed training of MoME (Mixture of Matryoshka Experts) for audio-visual speech recognition."""

from mome_dist import transformers_auto

__version__ = "0.1.0"

transformers_auto.announce()
