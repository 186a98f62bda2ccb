"""Visemes: which phones look alike, what the mouth does for each, and how neighbours blend.

A phone's viseme has a target for seven articulators and a dominance. The articulation at any time is the mean of the
targets of all segments, weighted by dominance and by closeness in time: the dominance model of co-articulation (Cohen
and Massaro, 1993). Closed lips and rounded vowels dominate; /h/ and schwa give way to what is around them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mome_dist.data.media import FPS


class Segment(NamedTuple):
    """A stretch of speech from ``start`` to ``end`` seconds with one viseme."""

    start: float
    end: float
    viseme: str


class Target(NamedTuple):
    """Articulation of a viseme, each value 0..1 except ``spread`` (-1 narrow .. 1 wide), and its dominance.

    jaw: opening; spread: lip width; rounding: protrusion; teeth: how much of them shows; tongue: how far it is raised;
    seal: lips pressed together; tuck: lower lip under the upper teeth.
    """

    jaw: float
    spread: float
    rounding: float
    teeth: float
    tongue: float
    seal: float
    tuck: float
    dominance: float


ARTICULATORS = Target._fields[:-1]

TARGETS: dict[str, Target] = {
    #              jaw  spread round teeth tongue seal tuck dominance
    "sil": Target(0.03, 0.00, 0.00, 0.0, 0.0, 0.4, 0.0, 0.7),
    "PBM": Target(0.02, 0.00, 0.05, 0.0, 0.0, 1.0, 0.0, 3.0),
    "FV": Target(0.17, 0.10, 0.00, 1.0, 0.0, 0.0, 1.0, 2.4),
    "TH": Target(0.30, 0.05, 0.00, 0.4, 1.0, 0.0, 0.0, 1.5),
    "TDN": Target(0.20, 0.15, 0.00, 0.8, 0.4, 0.0, 0.0, 0.8),
    "SZ": Target(0.15, 0.40, 0.00, 1.0, 0.0, 0.0, 0.0, 1.3),
    "SHCHJ": Target(0.20, -0.40, 0.80, 0.9, 0.0, 0.0, 0.0, 1.7),
    "KGN": Target(0.28, 0.00, 0.00, 0.2, 0.1, 0.0, 0.0, 0.6),
    "L": Target(0.38, 0.05, 0.00, 0.3, 0.8, 0.0, 0.0, 1.0),
    "R": Target(0.20, -0.30, 0.55, 0.3, 0.1, 0.0, 0.0, 1.1),
    "W": Target(0.10, -0.75, 1.00, 0.0, 0.0, 0.0, 0.0, 1.8),
    "H": Target(0.30, 0.00, 0.00, 0.1, 0.0, 0.0, 0.0, 0.3),
    "IY": Target(0.18, 0.85, 0.00, 0.6, 0.1, 0.0, 0.0, 1.2),
    "IH": Target(0.28, 0.45, 0.00, 0.5, 0.1, 0.0, 0.0, 1.0),
    "EH": Target(0.44, 0.40, 0.00, 0.4, 0.2, 0.0, 0.0, 1.1),
    "AE": Target(0.78, 0.35, 0.00, 0.4, 0.3, 0.0, 0.0, 1.3),
    "AA": Target(0.95, 0.00, 0.05, 0.2, 0.4, 0.0, 0.0, 1.3),
    "AH": Target(0.55, 0.05, 0.00, 0.3, 0.2, 0.0, 0.0, 1.0),
    "AX": Target(0.33, 0.00, 0.05, 0.2, 0.1, 0.0, 0.0, 0.5),
    "AO": Target(0.68, -0.45, 0.65, 0.1, 0.1, 0.0, 0.0, 1.3),
    "OW": Target(0.45, -0.65, 0.90, 0.0, 0.0, 0.0, 0.0, 1.3),
    "UW": Target(0.20, -0.80, 1.00, 0.0, 0.0, 0.0, 0.0, 1.5),
    "UH": Target(0.30, -0.50, 0.70, 0.1, 0.1, 0.0, 0.0, 1.1),
}
VISEME_NAMES: list[str] = list(TARGETS)
SILENCE = "sil"

_LEAD_SECONDS = 0.04  # lips move before the sound
_SPREAD_OF_DURATION = 0.45
_MIN_SPREAD, _MAX_SPREAD = 0.03, 0.12  # seconds
_SHARPNESS = 1.4


def blend(segments: list[Segment], frames: int) -> NDArray[np.float32]:
    """Co-articulated articulator track, float32 [frames, 7] in the order of `ARTICULATORS`, sampled mid-frame."""
    targets = np.array([TARGETS[segment.viseme] for segment in segments])
    starts, ends = np.array([segment[:2] for segment in segments]).T
    centres = (starts + ends) / 2 - _LEAD_SECONDS
    spreads = np.clip((ends - starts) * _SPREAD_OF_DURATION, _MIN_SPREAD, _MAX_SPREAD)
    times = (np.arange(frames) + 0.5) / FPS
    distance = np.abs(times[:, None] - centres) / spreads
    weights = targets[:, -1] * np.exp(-(distance**_SHARPNESS)) + 1e-6
    return (weights @ targets[:, :-1] / weights.sum(1, keepdims=True)).astype(np.float32)


def frame_labels(segments: list[Segment], frames: int) -> list[int]:
    """Viseme class (index into `VISEME_NAMES`) at the middle of every 25 fps frame; silence outside all segments."""
    labels = np.full(frames, VISEME_NAMES.index(SILENCE))
    times = (np.arange(frames) + 0.5) / FPS
    for start, end, viseme in segments:
        labels[(times >= start) & (times < end)] = VISEME_NAMES.index(viseme)
    return [int(label) for label in labels]
