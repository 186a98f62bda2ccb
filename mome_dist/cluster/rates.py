"""How fast one rank computes: wide products in bf16 and fp32, operations that only move data, calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

SHORTEST_TIMING, SHORTEST_RUN, ROUNDS, CALLS = 0.05, 1e-6, 3, 200
# Sides of the square matrices, and values of the vector that is copied: beyond every cache, yet quick.
CPU_SIDE, GPU_SIDE = 1024, 8192
CPU_VALUES, GPU_VALUES = 16_000_000, 256_000_000


@dataclass(frozen=True)
class Rates:
    """Rates of a rank: products in FLOP/s, bytes read and written a second, seconds of a call."""

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    call: float

    def record(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_rates(device: torch.device, side: int | None = None) -> Rates:
    """Measure this rank, which should have its core or GPU to itself.

    Args:
        side: of the matrices, for who cannot wait; by default they are wide enough for the best rate.
    """
    widest, values = (GPU_SIDE, GPU_VALUES) if device.type == "cuda" else (CPU_SIDE, CPU_VALUES)
    side = side or widest
    flops = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        flops[dtype] = 2 * side**3 / best_seconds(_product(left, right), device)
    source, target = (torch.empty(values, device=device) for _ in range(2))
    moved = 2 * values * source.element_size() / best_seconds(lambda: target.copy_(source), device)
    small = torch.zeros(8, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            small.add_(1.0)

    return Rates(flops[torch.bfloat16], flops[torch.float32], moved, best_seconds(calls, device) / CALLS)


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    return lambda: left @ right


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, in the best of a few rounds of as many runs as take a while.

    A GPU is asked for no more than that at once: launching takes microseconds, so that a loop that launches for a while
    would leave it minutes of work.
    """
    _seconds(run, 1, device)  # prepares kernels
    once = _seconds(run, 1, device)
    runs = max(1, math.ceil(SHORTEST_TIMING / max(once, SHORTEST_RUN)))
    return min(_seconds(run, runs, device) / runs for _ in range(ROUNDS))


def _seconds(run: Callable[[], object], runs: int, device: torch.device) -> float:
    """Seconds of some runs, to the end of what they launched."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(runs):
        run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
