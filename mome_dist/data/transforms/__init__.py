"""Transforms of raw clips, each small and by itself: what training adds, and what evaluation breaks on purpose.

    crop          a square of each frame, at one place for the whole clip
    flip          mirroring
    time_mask     spans of a clip replaced by its mean
    corruption    occlusion, blur and missing frames, for evaluation
    augmentation  all that a training does to an utterance's audio and video, from its configuration
    dropout       leaving out a stream of an audio-visual view

Video is uint8 [T, H, W], audio float32 [samples]. A transform never writes into what it is given, and what is random
about it comes from the generator that it is handed; `mome_dist.data.seeding` makes one from (seed, utterance id, draw).
"""

from mome_dist.data.transforms.augmentation import Augmentation
from mome_dist.data.transforms.corruption import CORRUPTIONS, corrupt
from mome_dist.data.transforms.crop import center_crop, random_crop
from mome_dist.data.transforms.dropout import ModalityDropout
from mome_dist.data.transforms.flip import random_flip
from mome_dist.data.transforms.time_mask import TimeMask

__all__ = [
    "CORRUPTIONS",
    "Augmentation",
    "ModalityDropout",
    "TimeMask",
    "center_crop",
    "corrupt",
    "random_crop",
    "random_flip",
]
