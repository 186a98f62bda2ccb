"""What every source of noise can do, and putting its noise on an utterance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mome_dist.data.corpus import Utterance
from mome_dist.data.media import Audio
from mome_dist.data.noise.mixing import measure_snr, mix_at_snr


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


def add(
    source: NoiseSource, speech: Audio, utterance: Utterance, snr: float | None, draw: int = 0
) -> tuple[Audio, Mapping[str, Any]]:
    """``speech`` of ``utterance``, float32 [samples], with noise at ``snr`` dB; None leaves it clean. See `mix_at_snr`.

    Returns:
        The mixture, and what is known of it as JSON values: ``id``, ``draw``, ``snr`` (asked, dB; None for clean),
        ``measured`` (in the mixture, dB; None for clean), ``origins`` (a list of [utterance id or file, offset]).

    Raises:
        UserError: if the source has no noise for the utterance.
    """
    record: dict[str, Any] = {"id": utterance.id, "draw": draw, "snr": snr, "measured": None, "origins": []}
    if snr is None:
        return speech, record
    noise = source.noise(utterance, draw)
    mixed = mix_at_snr(speech, noise, snr)
    measured = measure_snr(speech, noise, mixed)
    record["measured"] = None if measured is None else round(measured, 3)
    record["origins"] = [list(origin) for origin in source.origins(utterance, draw)]
    return mixed, record
