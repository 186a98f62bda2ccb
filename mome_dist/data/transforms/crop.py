"""Square crops of video, at one place for all frames of a clip."""

from __future__ import annotations

import numpy as np

from mome_dist.data.media import Video
from mome_dist.errors import UserError


def random_crop(video_THW: Video, size: int, rng: np.random.Generator) -> Video:
    """Cut ``size`` x ``size`` pixels anywhere, every place as likely: a view, uint8 [T, size, size].

    Raises:
        UserError: if the frames are smaller than that.
    """
    top, left = (int(rng.integers(room + 1)) for room in _room(video_THW, size))
    return video_THW[:, top : top + size, left : left + size]


def center_crop(video_THW: Video, size: int) -> Video:
    """Cut the middle, as evaluation does: a view, uint8 [T, size, size]. Video encoders do it themselves.

    Raises:
        UserError: if the frames are smaller than that.
    """
    top, left = (room // 2 for room in _room(video_THW, size))
    return video_THW[:, top : top + size, left : left + size]


def _room(video_THW: Video, size: int) -> tuple[int, int]:
    height, width = video_THW.shape[1:]
    if min(height, width) < size:
        raise UserError(
            f"Frames of {height} x {width} pixels cannot be cropped to {size} x {size}: make larger mouth crops, or "
            "crop less (augmentation.crop)."
        )
    return height - size, width - size
