"""How fast one rank computes: wide products in bf16 and fp32, operations that only move data, calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

SHORTEST_TIMING, ROUNDS, CALLS = 0.05, 3, 200
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
def measure_rates(device: torch.device) -> Rates:
    """Measure this rank, which should have its core or GPU to itself."""
    side, values = (GPU_SIDE, GPU_VALUES) if device.type == "cuda" else (CPU_SIDE, CPU_VALUES)
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
    """Seconds of a run, in the best of a few rounds of as many runs as take a while."""
    run()
    times = []
    for _ in range(ROUNDS):
        synchronize(device)
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < SHORTEST_TIMING:
            run()
            runs += 1
        synchronize(device)
        times.append((time.perf_counter() - began) / runs)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
