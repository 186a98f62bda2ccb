"""What a rank says of itself for the others to read (`mome_dist.parallel.whereabouts`)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

OWN_ERROR, USER_ERROR, VICTIM, ENDED = "error", "user error", "victim", "ended"
"""How a rank ended: by an error of its own, by a mistake of its user, because of another rank, or well."""


@dataclass(frozen=True)
class Sighting:
    """What a rank last said of itself.

    Attributes:
        host: name of its machine.
        step: optimiser steps done, None outside of training.
        place: what it was doing.
        since: when it came there, seconds of its own wall clock.
        visits: places it had been to; the ranks of a world go through the same ones.
        beats: heartbeats so far.
        fate: how it ended (`OWN_ERROR`, ...), None while it runs.
        reason: its last words.
    """

    host: str
    step: int | None
    place: str
    since: float
    visits: int = 0
    beats: int = 0
    fate: str | None = None
    reason: str = ""

    def where(self) -> str:
        """Such as ``in step 12, 'forward and backward', since 14:05:31``."""
        since = datetime.fromtimestamp(self.since).strftime("%H:%M:%S")
        return f"in {'' if self.step is None else f'step {self.step + 1}, '}{self.place!r}, since {since}"
