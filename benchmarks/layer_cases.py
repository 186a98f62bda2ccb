"""One case of `benchmarks.moe_layer` on one rank: the candidates, checked against each other, counted and timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from benchmarks.layer_candidates import (
    Layer,
    LayerShape,
    MoMELayer,
    TransformersLayer,
    build_layers,
    first_expert_gradient,
    transformers_layers,
)
from benchmarks.layer_options import STOCK
from benchmarks.layer_peers import MegatronLayer
from benchmarks.measuring import DTYPES, WireBytes, interleaved, median_milliseconds
from mome_dist.errors import first_line
from mome_dist.moe.dispatch.cost import COMMON, LayerLoad, choose, measure

M = TypeVar("M", bound=nn.Module)
# Largest difference from DeepSpeed's layer, of the largest value: a few roundings of the sums over experts.
TOLERANCE = {"bf16": 3e-2, "fp32": 1e-5}
# Transformers' weights are in bf16, and so is what `batched_mm` adds their gradients up in, row by row: the busiest
# expert has some 500 rows, a random walk of as many roundings is 22 times 2**-9.
PEER_TOLERANCE = {"bf16": 5e-2, "fp32": 1e-5}


def measure_case(shape: LayerShape, ep_rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one shape, the same on all ranks."""
    ep, dtype = dist.get_world_size(), DTYPES[options.precision]
    load = LayerLoad(
        tokens=options.tokens,
        hidden_size=shape.hidden_size,
        experts=shape.experts,
        shared=1,
        top_k=shape.top_k,
        bottleneck=shape.bottleneck,
        capacity_factor=None,
        element_bytes=dtype.itemsize,
        frozen_flops=0.0,  # the layer is alone here: nothing hides what travels
    )
    group = deepspeed_groups._get_expert_parallel_group(f"ep_size_{ep}")
    rates = measure(load, group, dtype, torch.device("cpu"))
    choice = choose(load, rates, ep)
    hidden_TH, gradient_TH = random_tokens(shape, options.tokens, dtype, seed=100 + dist.get_rank())
    layers: dict[str, Layer] = {**build_layers(shape, ep, ep_rank)}
    peers: dict[str, nn.Module] = {}
    failed: dict[str, str] = {}
    if ep == 1:  # transformers' experts know no other processes
        same, failed = those_that_run(transformers_layers(shape, dtype, options.tokens), hidden_TH, gradient_TH)
        layers |= same
        megatron = {"megatron": partial(MegatronLayer, shape, dtype, "allgather")}
        peers, others = those_that_run(megatron, hidden_TH, gradient_TH)
        failed |= others
    for name, errors in differences(layers, hidden_TH, gradient_TH).items():
        most = (PEER_TOLERANCE if isinstance(layers[name], TransformersLayer) else TOLERANCE)[options.precision]
        for what, error in errors.items():
            assert error < most, f"{name}: {what} differs from DeepSpeed's by {error:.1e}"
    sent = {name: _bytes_sent(layer, hidden_TH, gradient_TH) for name, layer in layers.items()}
    timings = interleaved(
        {name: one_pass(layer, hidden_TH, gradient_TH) for name, layer in {**layers, **peers}.items()},
        options.rounds,
        warm_up=options.warm_up,
    )
    seconds = {name: [each.device for each in rounds] for name, rounds in timings.items()}
    alltoall = layers["alltoall"]
    assert isinstance(alltoall, MoMELayer)
    counts_E = alltoall.load.of(0)[0, : shape.experts].double()
    candidates = {
        name: {
            "milliseconds": median_milliseconds(times),
            "least": min(times) * 1e3,
            "most": max(times) * 1e3,
            "predicted": choice.seconds[name] * 1e3 if name in choice.seconds else None,
            "bytes_sent": sent.get(name),
        }
        for name, times in seconds.items()
    }
    return {
        "processes": ep,
        "precision": options.precision,
        "tokens": options.tokens,
        **asdict(shape),
        "imbalance": float(counts_E.max() / counts_E.mean()),
        "candidates": candidates,
        "failed": failed,
        "auto": choice.name,
        "rates": asdict(rates),
    }


def random_tokens(shape: LayerShape, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H], and the gradient of the output; what all have in common loads the experts unevenly."""
    common_H = torch.randn(shape.hidden_size, generator=torch.Generator().manual_seed(1)) * COMMON
    generator = torch.Generator().manual_seed(seed)
    hidden_TH, gradient_TH = torch.randn(2, tokens, shape.hidden_size, generator=generator)
    return (hidden_TH + common_H).to(dtype).requires_grad_(), gradient_TH.to(dtype)


def one_pass(layer: nn.Module, hidden_TH: Tensor, gradient_TH: Tensor) -> Callable[[], None]:
    """One forward and backward pass of a layer that gives its output, and its auxiliary loss or None."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        hidden_TH.grad = None
        output_TH, auxiliary = layer(hidden_TH)
        losses = [] if auxiliary is None else [auxiliary]
        torch.autograd.backward([output_TH, *losses], [gradient_TH, *map(torch.ones_like, losses)])

    return run


def those_that_run(
    builders: Mapping[str, Callable[[], M]], hidden_TH: Tensor, gradient_TH: Tensor
) -> tuple[dict[str, M], dict[str, str]]:
    """Layers of others that make a pass where the hidden states are, and why others do not: not every layer takes
    every shape on every device, and what is left is worth measuring still."""
    found, failed = {}, {}
    for name, build in builders.items():
        try:
            layer = build().to(hidden_TH.device)
            one_pass(layer, hidden_TH, gradient_TH)()
        except Exception as problem:
            failed[name] = f"{type(problem).__name__}: {first_line(problem)}"
        else:
            found[name] = layer
    return found, failed


def differences(layers: Mapping[str, Layer], hidden_TH: Tensor, gradient_TH: Tensor) -> dict[str, dict[str, float]]:
    """How far the output and the first expert's gradient of each layer are from DeepSpeed's, of the largest value."""
    expected: dict[str, Tensor] = {}
    found = {}
    for name, layer in layers.items():
        one_pass(layer, hidden_TH, gradient_TH)()
        with torch.no_grad():
            actual = {"output": layer(hidden_TH)[0], "expert gradient": first_expert_gradient(layer)}
        expected = actual if name == STOCK else expected
        found[name] = {
            what: float((value.float() - expected[what].float()).abs().max() / expected[what].float().abs().max())
            for what, value in actual.items()
        }
    return found


def _bytes_sent(layer: nn.Module, hidden_TH: Tensor, gradient_TH: Tensor) -> float:
    """By this rank in one pass."""
    wire = WireBytes()
    with wire.counted():
        one_pass(layer, hidden_TH, gradient_TH)()
    return wire.sent
