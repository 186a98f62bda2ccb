"""What every source of noise can do, and putting its noise on an utterance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mome_dist.data.corpus import Utterance
from mome_dist.data.media import Audio
from mome_dist.data.noise.mixing import mix_at_snr


class Origin(NamedTuple):
    """Where a part of some noise was taken from: an utterance id or a file's path in its directory, and a position in
    its samples."""

    name: str
    offset: int


class NoiseSource(Protocol):
    """Noise for any utterance: a pure function of the source, the utterance's id and length, and ``draw``."""

    def noise(self, utterance: Utterance, draw: int = 0) -> Audio:
        """Noise as long as the utterance, of any level but never silent: float32 [samples]."""

    def origins(self, utterance: Utterance, draw: int = 0) -> Sequence[Origin]:
        """What `noise` is made of for the same arguments."""


def add(source: NoiseSource, speech: Audio, utterance: Utterance, snr: float | None, draw: int = 0) -> Audio:
    """``speech`` of ``utterance``, float32 [samples], with noise at ``snr`` dB; None leaves it clean. See `mix_at_snr`.

    Raises:
        UserError: if the source has no noise for the utterance.
    """
    return speech if snr is None else mix_at_snr(speech, source.noise(utterance, draw), snr)
