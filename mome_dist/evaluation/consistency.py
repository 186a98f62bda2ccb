"""Whether the shared router treats a modality alike at every rate, and how alike the views of a training run are.

A profile is the distribution over experts that the tokens of one view and modality choose in one layer. Two profiles
agree by ``1 - JSD``, with the Jensen-Shannon divergence in bits: 1 for equal profiles, 0 for disjoint experts.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mome_dist.evaluation.activations import MODALITIES, Activations
from mome_dist.evaluation.request import parse_views
from mome_dist.training_log import RoutingLog

Floats = NDArray[np.float64]


class Profile(NamedTuple):
    """A view and a modality that has tokens in it, with its distribution over experts: [layers, experts].

    ``rate`` is the rate of that modality in the view, None for text.
    """

    view: str
    modality: str
    rate: int | None
    shares: Floats


def profiles(activations: Activations) -> list[Profile]:
    """Every view and modality with tokens, modality by modality."""
    counts = activations.counts.double().numpy()
    found = []
    for number, modality in enumerate(MODALITIES):
        for column, view in enumerate(activations.views):
            chosen = counts[:, column, number]
            if chosen.sum() > 0:
                shares = chosen / chosen.sum(axis=-1, keepdims=True)
                found.append(Profile(view, modality, _rate(view, modality), shares))
    return found


def _rate(view: str, modality: str) -> int | None:
    parsed = parse_views(view)[0]
    return {"audio": parsed.audio_rate, "video": parsed.video_rate}.get(modality)


def agreement(p: Floats, q: Floats) -> Floats:
    """``1 - JSD(p, q)`` in bits along the last axis; both are distributions."""
    middle = (p + q) / 2

    def divergence(a: Floats) -> Floats:
        ratio = np.divide(a, middle, out=np.ones_like(a), where=a > 0)
        return (a * np.log2(ratio)).sum(axis=-1)

    return 1 - (divergence(p) + divergence(q)) / 2


def agreement_matrix(found: list[Profile]) -> Floats:
    """Agreement of every pair of profiles, mean over layers: [P, P]."""
    return np.array([[agreement(p.shares, q.shares).mean() for q in found] for p in found])


def agreement_between_rates(found: list[Profile]) -> dict[str, Floats]:
    """For each modality, the mean agreement of its profiles at different rates, layer by layer: [layers].

    Text has no rate of its own: any two views count. A modality at one rate only is left out. "audio against video" is
    what two different kinds of tokens reach: the level to compare with.
    """
    curves: dict[str, Floats] = {}
    for modality in MODALITIES:
        pairs = [
            (p.shares, q.shares)
            for p, q in combinations([profile for profile in found if profile.modality == modality], 2)
            if modality == "text" or p.rate != q.rate
        ]
        if pairs:
            curves[modality] = np.mean([agreement(p, q) for p, q in pairs], axis=0)
    audio = [profile.shares for profile in found if profile.modality == "audio"]
    video = [profile.shares for profile in found if profile.modality == "video"]
    if audio and video:
        curves["audio against video"] = np.mean([agreement(p, q) for p in audio for q in video], axis=0)
    return curves


def agreement_of_views(log: RoutingLog) -> Floats:
    """Agreement of the distributions of load over experts between every two views of a training run: [V, V, layers]."""
    totals = log.asked_by_view.sum(axis=-1, keepdims=True)
    shares = log.asked_by_view / np.maximum(totals, 1)
    return np.array([[agreement(p, q) for q in shares] for p in shares])
