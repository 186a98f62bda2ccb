"""Mirroring of video: a mouth seen in a mirror says the same."""

from __future__ import annotations

import numpy as np

from mome_dist.data.media import Video


def random_flip(video_THW: Video, probability: float, rng: np.random.Generator) -> Video:
    """Mirror all frames left to right with the given probability: a view, uint8 [T, H, W]."""
    return video_THW[:, :, ::-1] if rng.random() < probability else video_THW
