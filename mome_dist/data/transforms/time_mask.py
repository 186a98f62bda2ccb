"""Adaptive time masking (Ma et al., 2022): the longer a clip, the more spans of it are hidden.

Every ``stride`` frames (or samples) of a clip bring one span of 0 to ``width`` of them, both inclusive and all lengths
equally likely, at any place where it fits; spans may overlap. What is hidden becomes the mean over time of the clip:
its mean frame, or its mean sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import Audio, Video


@dataclass(frozen=True)
class TimeMask:
    """Mask of clips of any length.

    Attributes:
        width: longest span, in frames or samples; 0 masks nothing.
        stride: frames or samples that bring one span each; a remainder brings one too.
    """

    width: int
    stride: int

    def spans(self, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """First and one-past-last frame of each span of a clip."""
        if self.width == 0:
            return []
        count = -(-length // self.stride)
        widths = np.minimum(rng.integers(self.width + 1, size=count), length)
        starts = (rng.random(count) * (length - widths + 1)).astype(np.int64)
        return list(zip(starts.tolist(), (starts + widths).tolist(), strict=True))

    def video(self, video_THW: Video, rng: np.random.Generator) -> Video:
        """Hide spans of a clip, uint8 [T, H, W]."""
        spans = self.spans(len(video_THW), rng)
        return _filled(video_THW, np.rint(video_THW.mean(0)).astype(np.uint8), spans) if spans else video_THW

    def audio(self, audio: Audio, rng: np.random.Generator) -> Audio:
        """Hide spans of a waveform, float32 [samples]."""
        spans = self.spans(len(audio), rng)
        return _filled(audio, audio.mean(dtype=np.float64).astype(np.float32), spans) if spans else audio


def _filled(clip: NDArray, fill: NDArray, spans: list[tuple[int, int]]) -> NDArray:
    filled = clip.copy()
    for start, end in spans:
        filled[start:end] = fill
    return filled
