"""Which dispatch is cheapest: a cost model over bytes, FLOPs and rates that are measured where the run will be.

The model covers one MoE layer, forward and backward, on one rank. Weights that are gathered travel beside the frozen
layer's own compute, so only what that cannot hide is counted; tokens travel while everything waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

# Passes over the dispatched rows that all-to-all makes beside the products, forward and backward (sort, zero slots,
# weight, add up, and their gradients), and over the bottleneck activations that the dense form makes.
ROW_PASSES, BOTTLENECK_PASSES = 12, 14
# An expert gets more than its share of tokens; without a capacity factor every buffer is as long as the longest.
TYPICAL_IMBALANCE = 2.0
REPEATS = 5


@dataclass(frozen=True)
class LayerLoad:
    """What one MoE layer of one rank works on in one microbatch.

    Attributes:
        tokens: of the microbatch on this rank, padding included.
        hidden_size, experts, shared, top_k, bottleneck: of the module.
        capacity_factor: as configured; None drops nothing.
        element_bytes: of a hidden value.
        frozen_flops: of the frozen layer for these tokens, forward and backward.
    """

    tokens: int
    hidden_size: int
    experts: int
    shared: int
    top_k: int
    bottleneck: int
    capacity_factor: float | None
    element_bytes: int
    frozen_flops: float

    @property
    def rows(self) -> float:
        """Rows of this rank's dispatch buffer."""
        return self.tokens * self.top_k * (self.capacity_factor or TYPICAL_IMBALANCE)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        return self.experts * (2 * self.bottleneck * self.hidden_size + self.bottleneck + self.hidden_size)


@dataclass(frozen=True)
class Rates:
    """Measured speeds of one rank.

    Attributes:
        dense_flops, batched_flops: matrix products over all experts at once, and expert by expert, FLOP/s.
        copy_bytes: copies of rows, bytes read and written a second.
        link_bytes, latency: of an exchange between expert-parallel ranks, bytes/s and s.
    """

    dense_flops: float
    batched_flops: float
    copy_bytes: float
    link_bytes: float
    latency: float


@dataclass(frozen=True)
class Choice:
    """The chosen dispatch, the predicted seconds of each candidate, and why, in words."""

    name: str
    seconds: dict[str, float]
    reasons: tuple[str, ...]


def choose(load: LayerLoad, rates: Rates, ep: int) -> Choice:
    """The cheapest dispatch for a layer over ``ep`` expert-parallel ranks."""
    away = (ep - 1) / ep
    passes = 3  # forward, and the gradients of input and weight
    dense_flops = passes * 4 * load.tokens * (load.experts + load.shared) * load.bottleneck * load.hidden_size
    activations = load.tokens * (load.experts + load.shared) * load.bottleneck * 4
    dense = dense_flops / rates.dense_flops + BOTTLENECK_PASSES * activations / rates.copy_bytes
    # Gathered in the precision of the hidden states, reduced in fp32.
    weight_bytes = load.expert_parameters * (load.element_bytes + 4) * away
    hidden = load.frozen_flops / rates.dense_flops
    gather_wait = max(0.0, weight_bytes / rates.link_bytes - hidden) + 2 * rates.latency if ep > 1 else 0.0

    row_flops = passes * 4 * load.rows * load.bottleneck * load.hidden_size
    shared_flops = passes * 4 * load.tokens * load.shared * load.bottleneck * load.hidden_size
    row_bytes = load.rows * load.hidden_size * load.element_bytes
    token_bytes = 4 * row_bytes * away  # there and back, forward and backward
    alltoall_wait = token_bytes / rates.link_bytes + 4 * rates.latency if ep > 1 else 0.0
    alltoall = (
        row_flops / rates.batched_flops
        + shared_flops / rates.dense_flops
        + ROW_PASSES * row_bytes / rates.copy_bytes
        + alltoall_wait
    )
    weights = "gather" if ep > 1 else "local"
    seconds = {weights: dense + gather_wait, "alltoall": alltoall}
    reasons = (
        f"{weights}: {dense_flops / 1e9:.2f} GFLOP over all experts, {weight_bytes / 1e6:.2f} MB of weights on the "
        f"wire ({gather_wait * 1e3:.2f} ms not hidden): {seconds[weights] * 1e3:.1f} ms a layer",
        f"alltoall: {(row_flops + shared_flops) / 1e9:.2f} GFLOP, {token_bytes / 1e6:.2f} MB of tokens on the wire "
        f"({alltoall_wait * 1e3:.2f} ms): {alltoall * 1e3:.1f} ms a layer",
    )
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds, reasons)


@torch.no_grad()
def measure(load: LayerLoad, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure the rates for a layer's shapes; every rank of the world calls it and gets the slowest rank's rates."""
    ep = dist.get_world_size(group)
    width = (load.experts + load.shared) * load.bottleneck
    hidden_TH = torch.randn(load.tokens, load.hidden_size, device=device).to(dtype)
    weight_NH = torch.randn(width, load.hidden_size, device=device).to(dtype)
    dense = _seconds(lambda: F.linear(F.linear(hidden_TH, weight_NH), weight_NH.t()), device)
    per_expert = max(1, int(load.rows / load.experts))
    rows_ECH = torch.randn(load.experts, per_expert, load.hidden_size, device=device).to(dtype)
    weight_EHb = torch.randn(load.experts, load.hidden_size, load.bottleneck, device=device).to(dtype)
    batched = _seconds(lambda: torch.bmm(torch.bmm(rows_ECH, weight_EHb), weight_EHb.transpose(1, 2)), device)
    index = torch.randint(load.tokens, (load.experts * per_expert,), device=device)
    copy = _seconds(lambda: hidden_TH.index_select(0, index), device)
    link, latency = 1e12, 0.0
    if ep > 1:
        small, large = (torch.zeros(size - size % ep, dtype=dtype, device=device) for size in (64 * ep, 1_000_000))
        latency = _seconds(lambda: dist.all_to_all_single(torch.empty_like(small), small, group=group), device)
        whole = _seconds(lambda: dist.all_to_all_single(torch.empty_like(large), large, group=group), device)
        link = large.numel() * large.element_size() * (ep - 1) / ep / max(whole - latency, 1e-9)
    slowest = torch.tensor(
        [
            4 * load.tokens * width * load.hidden_size / dense,
            4 * rows_ECH.shape[0] * per_expert * load.bottleneck * load.hidden_size / batched,
            2 * index.numel() * load.hidden_size * load.element_bytes / copy,
            link,
            -latency,
        ],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    dense_flops, batched_flops, copy_bytes, link_bytes, negative = slowest.tolist()
    return Rates(dense_flops, batched_flops, copy_bytes, link_bytes, -negative)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[REPEATS // 2]
