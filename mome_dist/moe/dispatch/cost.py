"""Which dispatch is cheapest: each is tried at the layer's own shapes, and what the frozen layer hides is taken off.

A layer of the run's shape passes forward and backward on every rank at once, with each dispatch in turn, where the run
will be: its products, copies and exchanges, and ranks that share cores, cost there what they will cost. Only one thing
is not seen by trying: weights that are gathered travel beside the frozen layer's own compute, and wait only for what
that does not hide. Both are computed, from bytes and FLOPs at measured rates. That tokens go there beside the frozen
module, and come back while everything waits, is not: at a layer's own shapes it is all waited for.
``benchmarks/moe_layer.py`` shows what this predicts beside what it measures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.moe.dispatch.exchange import gathered, summed_share
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.forms.registry import DEFAULT, find_form
from mome_dist.moe.load import PassLoad
from mome_dist.token_context import TokenContext

PRODUCTS = 3  # forward, and the gradients of input and weight
# Seconds in which the candidates are tried, passes of each after some that do not count, timings of anything smaller.
TRIAL_SECONDS, LEAST_TRIALS, MOST_TRIALS, WARM_UP, TIMINGS = 0.8, 3, 11, 2, 4
MOST_BYTES = 8e6  # sent to measure the link
# A candidate whose products alone take this many times as long as all of the other is not tried.
HOPELESS = 2.0
# What all tokens have in common, as multiple of what they differ in: it loads the experts as unevenly as training does.
COMMON = 0.4


@dataclass(frozen=True)
class LayerLoad:
    """What one MoE layer of one rank works on in one microbatch.

    Attributes:
        tokens: of the microbatch on this rank, padding included.
        hidden_size, experts, shared, top_k, bottleneck: of the module.
        capacity_factor: as configured; None drops nothing.
        element_bytes: of a hidden value.
        frozen_flops: of the frozen layer for these tokens, forward and backward.
        expert: name of the experts' form.
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
    expert: str = DEFAULT

    @property
    def rows(self) -> float:
        """Rows that this rank's tokens become, one for each route that is kept; at most, with a capacity factor."""
        return self.tokens * self.top_k * min(self.capacity_factor or 1.0, 1.0)

    def expert_flops(self, rows: float) -> float:
        """Forward and backward of one expert for each of ``rows`` rows."""
        return PRODUCTS * 2 * rows * find_form(self.expert).macs(self.hidden_size, self.bottleneck)

    @property
    def dense_flops(self) -> float:
        """Forward and backward of all experts for every token of this rank."""
        return self.expert_flops(self.tokens * (self.experts + self.shared))

    @property
    def chosen_flops(self) -> float:
        """Forward and backward of the experts that this rank's tokens choose."""
        return self.expert_flops(self.rows + self.tokens * self.shared)

    def weight_bytes(self, ep: int) -> float:
        """Bytes of weights that a rank sends: gathered in the precision of the hidden states, reduced in fp32."""
        parameters = self.experts * find_form(self.expert).parameters(self.hidden_size, self.bottleneck)
        return parameters * (self.element_bytes + 4) * (ep - 1) / ep

    def token_bytes(self, ep: int) -> float:
        """Bytes of tokens that a rank sends: rows there and back, forward and backward; their gates, fp32, there and
        their gradients back."""
        width = find_form(self.expert).width(self.hidden_size, self.bottleneck)
        return self.rows * (4 * width * self.element_bytes + 2 * 4) * (ep - 1) / ep


@dataclass(frozen=True)
class Rates:
    """What one rank measured, or the slowest of several.

    Attributes:
        seconds: of a layer by itself, forward and backward, by dispatch; those that were tried.
        dense_flops: of the products of the dense form, FLOP/s.
        link_bytes: of a gather of weights and the reduction of their gradients, bytes/s.
    """

    seconds: Mapping[str, float]
    dense_flops: float
    link_bytes: float


@dataclass(frozen=True)
class Choice:
    """The chosen dispatch, the predicted seconds of each candidate, and why, in words."""

    name: str
    seconds: dict[str, float]
    reasons: tuple[str, ...]


def choose(load: LayerLoad, rates: Rates, ep: int) -> Choice:
    """The cheapest dispatch for a layer over ``ep`` expert-parallel ranks."""
    weights = "gather" if ep > 1 else "local"
    travel = load.weight_bytes(ep) / rates.link_bytes
    # A candidate that was not tried takes no less than its products and its travel.
    dense = rates.seconds.get(weights, load.dense_flops / rates.dense_flops + travel)
    hidden = min(travel, load.frozen_flops / rates.dense_flops)
    seconds = {
        weights: max(dense - hidden, load.dense_flops / rates.dense_flops),
        "alltoall": rates.seconds["alltoall"],
    }
    reasons = {
        weights: f"{load.dense_flops / 1e9:.2f} GFLOP over all experts",
        "alltoall": f"{load.chosen_flops / 1e9:.2f} GFLOP over the chosen experts",
    }
    if ep > 1:
        reasons[weights] += (
            f", {load.weight_bytes(ep) / 1e6:.2f} MB of weights on the wire "
            f"({hidden * 1e3:.2f} of {travel * 1e3:.2f} ms hidden by the frozen layer)"
        )
        reasons["alltoall"] += f", {load.token_bytes(ep) / 1e6:.2f} MB of tokens on the wire"
    how = {name: "tried" if name in rates.seconds else "not tried, at least" for name in seconds}
    return Choice(
        min(seconds, key=lambda name: seconds[name]),
        seconds,
        tuple(f"{name}: {reasons[name]}: {how[name]} {seconds[name] * 1e3:.1f} ms a layer" for name in seconds),
    )


def measure(load: LayerLoad, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> Rates:
    """Try each dispatch; every rank of the world calls it and gets the slowest rank's figures.

    Args:
        group: the expert-parallel ranks.

    The state of the random generators is left as it was.
    """
    ep = dist.get_world_size(group)
    weights = "gather" if ep > 1 else "local"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        common_H = torch.randn(load.hidden_size, device=device) * COMMON
        torch.manual_seed(dist.get_rank())
        hidden_TH, gradient_TH = torch.randn(2, load.tokens, load.hidden_size, device=device)
        hidden_TH, gradient_TH = (hidden_TH + common_H).to(dtype).requires_grad_(), gradient_TH.to(dtype)
        dense_flops = _dense_flops(load, hidden_TH.detach())
        link_bytes = _link_bytes(load, group, dtype, device)
        passes = {"alltoall": _pass(_layer(load, group, "alltoall", device), hidden_TH, gradient_TH)}
        once = min(_slowest(passes["alltoall"], device) for _ in range(2))  # the first one also prepares kernels
        if load.dense_flops / dense_flops < HOPELESS * once:
            passes[weights] = _pass(_layer(load, group, weights, device), hidden_TH, gradient_TH)
    rounds = min(max(round(TRIAL_SECONDS / (2 * once)), LEAST_TRIALS), MOST_TRIALS)
    turns = [{name: _slowest(run, device) for name, run in passes.items()} for _ in range(WARM_UP + rounds)]
    seconds = {name: statistics.median(turn[name] for turn in turns[WARM_UP:]) for name in passes}
    return Rates(seconds, dense_flops, link_bytes)


def _layer(load: LayerLoad, group: dist.ProcessGroup, dispatch: str, device: torch.device) -> ExpertParallelMoME:
    layer = ExpertParallelMoME(
        load.hidden_size,
        load.experts,
        load.top_k,
        load.shared,
        load.bottleneck,
        expert=load.expert,
        ep_size=dist.get_world_size(group),
        dispatch=dispatch,
        capacity_factor=load.capacity_factor,
    )
    layer.set_deepspeed_parallelism()
    layer.set_token_group(group)
    layer.initialize("trial", 0)
    return layer.to(device).train()


def _pass(layer: ExpertParallelMoME, hidden_TH: Tensor, gradient_TH: Tensor) -> Callable[[], None]:
    """One forward and backward pass, with the balance loss.

    Its counts are of this rank: those of all layers are summed at once, whatever the dispatch.
    """
    context = TokenContext.of([("trial", [len(hidden_TH)])], multiple=1).to(hidden_TH.device)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        hidden_TH.grad = None
        layer.prefetch(hidden_TH.dtype)
        counts = PassLoad(context.view_names, None)
        output_TH = layer(hidden_TH, context, counts)
        counts.reduce()
        output_TH.backward(gradient_TH)

    return run


def _dense_flops(load: LayerLoad, hidden_TH: Tensor) -> float:
    """FLOP/s of products as large as those of the dense form, or as the first thousand units of it."""
    units = min((load.experts + load.shared) * load.bottleneck, 1024)
    units_NH = torch.randn(units, load.hidden_size, device=hidden_TH.device).to(hidden_TH.dtype)

    def products() -> None:
        narrow_TN = hidden_TH @ units_NH.t()
        narrow_TN @ units_NH
        narrow_TN.t() @ hidden_TH

    seconds = statistics.median(_slowest(products, hidden_TH.device) for _ in range(1 + TIMINGS))
    return PRODUCTS * 2 * units * hidden_TH.numel() / seconds


def _link_bytes(load: LayerLoad, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes a second that a rank sends, of a gather of at most a layer's weights and the reduction of as many
    gradients."""
    ep = dist.get_world_size(group)
    if ep == 1:
        return 1e12  # nothing is sent
    sent = min(load.weight_bytes(ep), MOST_BYTES)
    numbers = max(int(sent / (load.element_bytes + 4) / (ep - 1)), 1)  # of one rank
    mine, gradients = torch.zeros(numbers, dtype=dtype, device=device), torch.zeros(ep * numbers, device=device)

    def travel() -> None:
        gathered(mine, group).land()
        summed_share(gradients, group).land()

    return sent / statistics.median(_slowest(travel, device) for _ in range(1 + TIMINGS))


def _slowest(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a run that all ranks start together, of the slowest one."""
    dist.barrier()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)
