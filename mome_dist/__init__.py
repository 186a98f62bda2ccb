"""Distributed training of MoME (Mixture of Matryoshka Experts) for audio-visual speech recognition.

import mome_dist
model = mome_dist.load("runs/quickstart")               # a run, one of its checkpoints, or an export
said = model.transcribe("clip.mp4", audio_rate=4, video_rate=2)
print(said.text, said.confidence)
"""

from mome_dist import transformers_auto
from mome_dist.loading import load
from mome_dist.versions import __version__

__all__ = ["__version__", "load"]

transformers_auto.announce()
