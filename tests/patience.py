"""How long tests wait: times of an idle machine, stretched by how slow this one is."""

from __future__ import annotations

import functools
import time

_LOOPS, _IDLE_SECONDS = 20_000_000, 0.5  # what this work takes where nothing else runs
_RESERVE = 2.0  # a machine may become busier than it was
_MOST = 12.0  # a wait has to end


@functools.cache
def stretch() -> float:
    """By what to multiply a time, between 2 and 12; measured once a process."""
    began = time.monotonic()
    for _ in range(_LOOPS):
        pass
    slowness = max(1.0, (time.monotonic() - began) / _IDLE_SECONDS)
    return min(_RESERVE * slowness, _MOST)


def patience(seconds: float) -> float:
    """How long to wait for what takes up to ``seconds`` on an idle machine; every timeout here is one of these."""
    return seconds * stretch()
