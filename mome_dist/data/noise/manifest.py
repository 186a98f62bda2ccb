"""Which noise went into which utterance: one JSON line a mixture, the same whoever made the mixtures in whatever order.

Keys: ``id``, ``draw``, ``snr`` (asked, dB; null for clean), ``measured`` (in the mixture, dB; null for clean),
``origins`` (a list of [utterance id or file, offset in samples]).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mome_dist.data.corpus import Utterance
from mome_dist.data.media import Audio
from mome_dist.data.noise.mixing import measure_snr, mix_at_snr
from mome_dist.data.noise.source import NoiseSource
from mome_dist.files import write_text


def add_recorded(
    source: NoiseSource, speech: Audio, utterance: Utterance, snr: float | None, draw: int = 0
) -> tuple[Audio, dict[str, Any]]:
    """`mome_dist.data.noise.add`, and its line for the manifest."""
    record: dict[str, Any] = {"id": utterance.id, "draw": draw, "snr": snr, "measured": None, "origins": []}
    if snr is None:
        return speech, record
    noise = source.noise(utterance, draw)
    mixed = mix_at_snr(speech, noise, snr)
    measured = measure_snr(speech, noise, mixed)
    record["measured"] = None if measured is None else round(measured, 3)
    record["origins"] = [list(origin) for origin in source.origins(utterance, draw)]
    return mixed, record


def write_manifest(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the lines sorted by utterance, draw and ratio (clean last), whole or not at all."""

    def key(record: Mapping[str, Any]) -> tuple[str, int, float]:
        return record["id"], record["draw"], math.inf if record["snr"] is None else record["snr"]

    write_text(path, "".join(f"{json.dumps(record)}\n" for record in sorted(records, key=key)))
