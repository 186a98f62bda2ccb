"""Seconds of an operation on a device: of its own clock on a GPU, so that launching does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, REPEATS = 3, 10


def median_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Median over ten calls, after three that do not count."""
    for _ in range(WARM_UP):
        run()
    return statistics.median(_seconds(device, run) for _ in range(REPEATS))


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
