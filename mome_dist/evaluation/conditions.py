"""What an evaluation lets a model hear and see: clean clips, noise at a ratio, broken video.

A condition that a view cannot notice (noise for lips alone) is the clean one, so that nothing is decoded twice. Noise
and corruptions depend on the seed and the utterance alone: they are the same at any number of ranks, in any order, and
the noise is the same at all ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mome_dist.data.corpus import Corpus, Utterance
from mome_dist.data.media import Audio, Video
from mome_dist.data.noise import NoiseSource, measure_snr, mix_at_snr, open_noise
from mome_dist.data.transforms import CORRUPTIONS, corrupt
from mome_dist.errors import UserError
from mome_dist.speech.views import View

CLEAN, NO_CORRUPTION = "clean", "none"
DEFAULT_SEVERITY = 0.5


@dataclass(frozen=True)
class Condition:
    """What is done to clips.

    Attributes:
        noise: "babble", or a directory of recordings; None for none.
        snr: in dB; None exactly where there is no noise: 0.0 is noise as loud as speech.
        corruption: of the video, as ``kind:severity``; None for none.
    """

    noise: str | None = None
    snr: float | None = None
    corruption: str | None = None

    def __post_init__(self) -> None:
        assert (self.noise is None) == (self.snr is None)

    def of(self, view: View) -> Condition:
        """What a view notices of it."""
        heard = self if view.audio_rate is not None else replace(self, noise=None, snr=None)
        return heard if view.video_rate is not None else replace(heard, corruption=None)

    def __str__(self) -> str:
        parts = [] if self.noise is None else [f"{Path(self.noise).name} {self.snr:g} dB"]
        parts += [] if self.corruption is None else [self.corruption]
        return ", ".join(parts) or CLEAN

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "condition": str(self),
            "noise": self.noise,
            "snr": self.snr,
            "video_corruption": self.corruption,
        }


class Case(NamedTuple):
    """A view under a condition: one number of a table."""

    view: View
    condition: Condition


def conditions_of(noises: Sequence[str], snrs: Sequence[float], corruptions: Sequence[str]) -> list[Condition]:
    """Every noise at every ratio, each with every corruption.

    Args:
        noises: "clean", "babble" or a directory.
        snrs: in dB.
        corruptions: "none", or a kind with or without ``:severity``.

    Raises:
        UserError: an empty list, an unknown corruption or severity, or noise without a ratio.
    """
    for key, values in (("noise", noises), ("video_corruption", corruptions)):
        if not values:
            raise UserError(f"{key} is empty: leave it out for clips as they are.")
    if not snrs and any(noise != CLEAN for noise in noises):
        raise UserError("snr is empty: name ratios in dB, such as snr=[-5,0,5,10].")
    heard: list[tuple[str | None, float | None]] = []
    for noise in noises:
        heard += [(None, None)] if noise == CLEAN else [(noise, snr) for snr in snrs]
    seen = [None if name == NO_CORRUPTION else _corruption(name) for name in corruptions]
    names = [str(condition) for condition in (Condition(*pair) for pair in dict.fromkeys(heard))]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"noise: two sources would both be called {name!r} in the tables; rename a directory.")
    pairs = product(dict.fromkeys(heard), dict.fromkeys(seen))
    return [Condition(noise, snr, corruption) for (noise, snr), corruption in pairs]


def _corruption(name: str) -> str:
    """``kind:severity`` of what was asked for."""
    kind, colon, severity = name.partition(":")
    if kind not in CORRUPTIONS:
        raise UserError(f"video_corruption={name}: choose from {NO_CORRUPTION}, {', '.join(CORRUPTIONS)}.")
    try:
        value = float(severity) if colon else DEFAULT_SEVERITY
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise UserError(f"video_corruption={name}: the severity after the colon must be above 0 and at most 1.")
    return f"{kind}:{value:g}"


def cases_of(views: Sequence[View], conditions: Sequence[Condition]) -> list[Case]:
    """Every view under every condition that it notices, condition by condition, none twice."""
    return list(dict.fromkeys(Case(view, condition.of(view)) for condition in conditions for view in views))


def open_sources(conditions: Sequence[Condition], corpus: Corpus, split: str, seed: int) -> dict[str, NoiseSource]:
    """The source of each noise that the conditions name; babble is made from a split of the corpus.

    Raises:
        UserError: see `mome_dist.data.noise.open_noise`.
    """
    names = dict.fromkeys(condition.noise for condition in conditions if condition.noise is not None)
    return {name: open_noise(name, corpus, split, seed=seed) for name in names}


class ClipReader:
    """Reads one utterance under any condition; what is read or drawn once serves all.

    Args:
        corpus: that the utterance is in.
        sources: of noise, by the names that conditions give them.
        seed: of corruptions.
    """

    def __init__(self, corpus: Corpus, utterance: Utterance, sources: Mapping[str, NoiseSource], seed: int) -> None:
        self._corpus, self._utterance, self._sources, self._seed = corpus, utterance, sources, seed
        self._noise: dict[str, Audio] = {}

    @cached_property
    def _speech(self) -> Audio:
        return self._corpus.audio(self._utterance)

    @cached_property
    def _lips(self) -> Video:
        return self._corpus.video(self._utterance)

    def audio(self, condition: Condition) -> Audio:
        """What is heard: float32 [samples]."""
        if condition.noise is None:
            return self._speech
        return mix_at_snr(self._speech, self._noise_of(condition.noise), condition.snr)

    def _noise_of(self, name: str) -> Audio:
        if name not in self._noise:
            self._noise[name] = self._sources[name].noise(self._utterance)
        return self._noise[name]

    def mixture(self, condition: Condition, mixed: Audio) -> dict[str, Any]:
        """What is known of a mixture, as JSON values: the ratio is measured in what the model hears."""
        assert condition.noise is not None
        measured = measure_snr(self._speech, self._noise_of(condition.noise), mixed)
        origins = self._sources[condition.noise].origins(self._utterance)
        return {
            "noise": condition.noise,
            "id": self._utterance.id,
            "snr": condition.snr,
            "measured": None if measured is None else round(measured, 3),
            "origins": [list(origin) for origin in origins],
        }

    def video(self, corruption: str | None) -> Video:
        """What is seen: uint8 [T, 96, 96]."""
        if corruption is None:
            return self._lips
        kind, _, severity = corruption.partition(":")
        return corrupt(self._lips, kind, float(severity), self._utterance.id, self._seed)
