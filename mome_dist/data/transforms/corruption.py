"""Breaking video on purpose, to see how an audio-visual model holds up. For evaluation; training does not use it.

``severity`` goes from 0 (untouched) to 1 (worst) and means, by kind:

occlusion       a patch of noise over this share of the frame's height and width, at one place for the whole clip
blur            a Gaussian of this share of an eighth of the frame's height as standard deviation
missing_frames  this share of the frames, in runs of 5 to 15 frames, is black
missing_video   this share of the clips is black from beginning to end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np

from mome_dist.data.media import Video
from mome_dist.data.seeding import utterance_rng
from mome_dist.errors import UserError

_RUN = (5, 15)  # frames that go missing together
_WIDEST_BLUR = 1 / 8  # of the frame's height


def _occlusion(video_THW: Video, severity: float, rng: np.random.Generator) -> Video:
    extents = video_THW.shape[1:]
    height, width = (round(severity * extent) for extent in extents)
    top, left = int(rng.integers(extents[0] - height + 1)), int(rng.integers(extents[1] - width + 1))
    occluded = video_THW.copy()
    occluded[:, top : top + height, left : left + width] = rng.integers(256, size=(height, width), dtype=np.uint8)
    return occluded


def _blur(video_THW: Video, severity: float, _rng: np.random.Generator) -> Video:
    sigma = severity * _WIDEST_BLUR * video_THW.shape[1]
    return np.stack([cv2.GaussianBlur(np.ascontiguousarray(frame), (0, 0), sigma) for frame in video_THW])


def _missing_frames(video_THW: Video, severity: float, rng: np.random.Generator) -> Video:
    missing = np.zeros(len(video_THW), bool)
    wanted = round(severity * len(missing))
    while missing.sum() < wanted:
        start = int(rng.integers(len(missing)))
        run = start + int(rng.integers(_RUN[0], _RUN[1] + 1))
        fresh = np.flatnonzero(~missing[start:run])[: wanted - missing.sum()]
        missing[start + fresh] = True
    return np.where(missing[:, None, None], np.uint8(0), video_THW)


def _missing_video(video_THW: Video, severity: float, rng: np.random.Generator) -> Video:
    return np.zeros_like(video_THW) if rng.random() < severity else video_THW


CORRUPTIONS: Mapping[str, Callable[[Video, float, np.random.Generator], Video]] = {
    "occlusion": _occlusion,
    "blur": _blur,
    "missing_frames": _missing_frames,
    "missing_video": _missing_video,
}


def corrupt(video_THW: Video, kind: str, severity: float, utterance_id: str, seed: int = 0, draw: int = 0) -> Video:
    """Corrupt a clip, uint8 [T, H, W]; a pure function of the arguments.

    Raises:
        UserError: for an unknown kind, or a severity outside 0 to 1.
    """
    if kind not in CORRUPTIONS:
        raise UserError(f"corruption {kind!r} is unknown: choose from {', '.join(CORRUPTIONS)}.")
    if not 0 <= severity <= 1:
        raise UserError(f"corruption {kind} of severity {severity}: choose from 0 (none) to 1 (worst).")
    if severity == 0:
        return video_THW
    return CORRUPTIONS[kind](video_THW, severity, utterance_rng(seed, kind, utterance_id, draw))
