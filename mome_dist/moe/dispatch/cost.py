"""Which dispatch is cheapest: a cost model over bytes, FLOPs and calls, at rates measured where the run will be.

The model covers one MoE layer, forward and backward, on one rank. Weights that are gathered travel beside the frozen
layer's own compute, so only what that cannot hide is counted; tokens travel while everything waits. The constants below
are how often each dispatch passes over its data and how many operations it calls: estimates, counted from the code.
``benchmarks/moe_layer.py`` shows what they predict beside what it measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Passes over memory beside the products, forward and backward: over the units of all experts and over their weights
# (dense form), over the dispatched rows and the weights (all-to-all), over the hidden states (router, both).
UNIT_PASSES, WEIGHT_PASSES, ROW_PASSES, HIDDEN_PASSES = 6.0, 4.0, 12.0, 6.0
# Operations called whatever the sizes, and for each expert of the rank (its parameters are separate tensors).
DENSE_CALLS, ALLTOALL_CALLS, EXPERT_CALLS = 120, 200, 12
# An expert gets more than its share of tokens; without a capacity factor every buffer is as long as the longest.
TYPICAL_IMBALANCE = 2.0
PRODUCTS = 3  # forward, and the gradients of input and weight
# How the rates are measured: seconds of a timing at least, exchanges, operations in a chain.
SHORTEST_TIMING, EXCHANGES, SMALL_OPERATIONS = 0.02, 20, 50


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
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states."""
        return self.tokens * self.hidden_size * self.element_bytes

    def parameters(self, experts: int) -> int:
        """Parameters of that many experts."""
        return experts * (2 * self.bottleneck * self.hidden_size + self.bottleneck + self.hidden_size)

    def expert_flops(self, rows: float) -> float:
        """Forward and backward of one expert (two products) for each of ``rows`` rows."""
        return PRODUCTS * 4 * rows * self.bottleneck * self.hidden_size


@dataclass(frozen=True)
class Rates:
    """Measured speeds of one rank.

    Attributes:
        dense_flops, batched_flops, router_flops: products over all experts at once, expert by expert, and of the fp32
            router, FLOP/s.
        copy_bytes: copies of rows, bytes read and written a second.
        link_bytes, latency: of an exchange between expert-parallel ranks, bytes/s and s.
        call: of one small operation, s.
    """

    dense_flops: float
    batched_flops: float
    router_flops: float
    copy_bytes: float
    link_bytes: float
    latency: float
    call: float


@dataclass(frozen=True)
class Choice:
    """The chosen dispatch, the predicted seconds of each candidate, and why, in words."""

    name: str
    seconds: dict[str, float]
    reasons: tuple[str, ...]


def choose(load: LayerLoad, rates: Rates, ep: int) -> Choice:
    """The cheapest dispatch for a layer over ``ep`` expert-parallel ranks."""
    weights = "gather" if ep > 1 else "local"
    common = _common_seconds(load, rates, ep)
    dense, dense_reason = _dense_seconds(load, rates, ep)
    alltoall, alltoall_reason = _alltoall_seconds(load, rates, ep)
    seconds = {weights: common + dense, "alltoall": common + alltoall}
    reasons = tuple(
        f"{name}: {reason}: {seconds[name] * 1e3:.1f} ms a layer"
        for name, reason in ((weights, dense_reason), ("alltoall", alltoall_reason))
    )
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds, reasons)


def _common_seconds(load: LayerLoad, rates: Rates, ep: int) -> float:
    """The router, and the parameters of this rank's experts, which are separate tensors."""
    router_flops = PRODUCTS * 2 * load.tokens * load.experts * load.hidden_size
    passed = HIDDEN_PASSES * load.hidden_bytes / rates.copy_bytes
    return router_flops / rates.router_flops + passed + EXPERT_CALLS * load.experts / ep * rates.call


def _dense_seconds(load: LayerLoad, rates: Rates, ep: int) -> tuple[float, str]:
    """All experts for every token of this rank, with weights that are gathered or here."""
    experts = load.experts + load.shared
    flops = load.expert_flops(load.tokens * experts)
    unit_bytes = load.tokens * experts * load.bottleneck * load.element_bytes
    passed = UNIT_PASSES * unit_bytes + WEIGHT_PASSES * 4 * load.parameters(experts)
    work = flops / rates.dense_flops + passed / rates.copy_bytes + DENSE_CALLS * rates.call
    if ep == 1:
        return work, f"{flops / 1e9:.2f} GFLOP over all experts"
    # Gathered in the precision of the hidden states, reduced in fp32.
    wire_bytes = load.parameters(load.experts) * (load.element_bytes + 4) * (ep - 1) / ep
    beside = load.frozen_flops / rates.dense_flops
    wait = max(0.0, wire_bytes / rates.link_bytes - beside) + 2 * rates.latency
    reason = f"{flops / 1e9:.2f} GFLOP over all experts, {wire_bytes / 1e6:.2f} MB of weights on the wire"
    return work + wait, f"{reason} ({wait * 1e3:.2f} ms not hidden)"


def _alltoall_seconds(load: LayerLoad, rates: Rates, ep: int) -> tuple[float, str]:
    """The chosen experts only, for tokens that are sorted by expert and travel."""
    row_flops, shared_flops = load.expert_flops(load.rows), load.expert_flops(load.tokens * load.shared)
    row_bytes = load.rows * load.hidden_size * load.element_bytes
    passed = ROW_PASSES * row_bytes + WEIGHT_PASSES * 4 * load.parameters(load.experts) / ep
    work = row_flops / rates.batched_flops + shared_flops / rates.dense_flops + passed / rates.copy_bytes
    work += ALLTOALL_CALLS * rates.call
    reason = f"{(row_flops + shared_flops) / 1e9:.2f} GFLOP over the chosen experts"
    if ep == 1:
        return work, reason
    wire_bytes = 4 * row_bytes * (ep - 1) / ep  # there and back, forward and backward
    wait = wire_bytes / rates.link_bytes + 4 * rates.latency
    return work + wait, f"{reason}, {wire_bytes / 1e6:.2f} MB of tokens on the wire ({wait * 1e3:.2f} ms)"


def measure(load: LayerLoad, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure the rates for a layer's shapes; every rank of the world calls it and gets the slowest rank's rates."""
    units = (load.experts + load.shared) * load.bottleneck
    hidden_TH, units_NH = (torch.randn(rows, load.hidden_size, device=device) for rows in (load.tokens, units))
    per_expert = max(1, int(load.rows / load.experts))
    rows_ECH, weight_EbH = (
        torch.randn(load.experts, rows, load.hidden_size, device=device).to(dtype)
        for rows in (per_expert, load.bottleneck)
    )
    dense = _seconds(lambda: _expert_products(hidden_TH.to(dtype), units_NH.to(dtype)), device)
    batched = _seconds(lambda: _expert_products(rows_ECH, weight_EbH), device)
    router = _seconds(lambda: _router_products(hidden_TH, units_NH[: load.experts]), device)
    index = torch.randint(load.tokens, (load.experts * per_expert,), device=device)
    source_TH = hidden_TH.to(dtype)
    copy = _seconds(lambda: source_TH.index_select(0, index), device)
    link, latency = _link_bytes_and_latency(group, dtype, device)
    call = _seconds(lambda: _small_operations(device), device) / (2 * SMALL_OPERATIONS)
    # The slowest rank counts: the least of the rates, and the most of the times.
    slowest = torch.tensor(
        [
            load.expert_flops(load.tokens * (load.experts + load.shared)) / dense,
            load.expert_flops(load.experts * per_expert) / batched,
            PRODUCTS * 2 * load.tokens * load.experts * load.hidden_size / router,
            2 * index.numel() * load.hidden_size * load.element_bytes / copy,
            link,
            -latency,
            -call,
        ],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    dense, batched, router, copy, link, latency, call = slowest.tolist()
    return Rates(dense, batched, router, copy, link, -latency, -call)


@torch.no_grad()
def _expert_products(x: Tensor, weight: Tensor) -> None:
    """The six products of a pair of projections: x [..., rows, H], weight [..., units, H]."""
    narrow = x @ weight.mT
    wide = narrow @ weight
    grad_narrow = wide @ weight.mT
    for left, right in ((grad_narrow, weight), (grad_narrow.mT, x), (narrow.mT, wide)):
        left @ right


@torch.no_grad()
def _router_products(hidden_TH: Tensor, weight_EH: Tensor) -> None:
    logits_TE = hidden_TH @ weight_EH.t()
    for left, right in ((logits_TE, weight_EH), (logits_TE.t(), hidden_TH)):
        left @ right


def _small_operations(device: torch.device) -> None:
    """A chain of operations on almost nothing, forward and backward: what they cost is the call."""
    value = torch.zeros(8, device=device, requires_grad=True)
    for _ in range(SMALL_OPERATIONS):
        value = value * 1.0
    value.sum().backward()


def _link_bytes_and_latency(group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes a second between expert-parallel ranks, and the seconds that an exchange of nothing takes."""
    ep = dist.get_world_size(group)
    if ep == 1:
        return 1e12, 0.0
    small, large = (torch.zeros(size - size % ep, dtype=dtype, device=device) for size in (64 * ep, 1_000_000))

    def exchange(source: Tensor) -> Callable[[], object]:
        return lambda: dist.all_to_all_single(torch.empty_like(source), source, group=group)

    # A fixed number of times: every rank must make the same calls.
    latency, whole = (_seconds(exchange(source), device, repeats=EXCHANGES) for source in (small, large))
    return large.numel() * large.element_size() * (ep - 1) / ep / max(whole - latency, 1e-9), latency


def _seconds(run: Callable[[], object], device: torch.device, repeats: int | None = None) -> float:
    """Mean seconds of a run after a first one, over ``repeats`` runs or as many as take a while.

    A mean, because where ranks share cores a median leaves out the time that a rank waits for its turn.
    """
    run()
    _synchronize(device)
    began, runs = time.perf_counter(), 0
    while runs < (repeats or 1) or (repeats is None and time.perf_counter() - began < SHORTEST_TIMING):
        run()
        runs += 1
    _synchronize(device)
    return (time.perf_counter() - began) / runs


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
