"""The measuring part of `benchmarks.gpu.layer`: every candidate of a size, timed and traced in one process."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cluster import cluster_record, layer_prediction
from benchmarks.gpu.trace import traced
from benchmarks.layer_candidates import LayerShape, build_layers, transformers_layers
from benchmarks.layer_cases import differences, one_pass, random_tokens, those_that_run
from benchmarks.layer_peers import MegatronLayer, Products
from benchmarks.measuring import interleaved, median_milliseconds
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.measured import Check

DTYPE = torch.bfloat16
INPUT_SETS = 4  # that take turns: one alone would stay in the cache
# Names of the two floors: as many units as a form of the layer computes for a token.
ALL, CHOSEN = "products of all experts", "products of the chosen experts"
FLOOR_OF = {"local": ALL, "alltoall": CHOSEN}


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of both sizes."""
    sizes = [(3072, 24, 12), (2048, 64, 128)] if not options.tiny else [(64, 6, 4), (32, 8, 8)]
    with parallel_world(Layout.for_world(1), 0, timeout_seconds=600):
        cluster = cluster_record(device, options.tiny)
        cases = [_case(LayerShape(h, e, 4, b), options, device, cluster) for h, e, b in sizes]
    planned = [
        Check(f"a layer, H {case['hidden_size']}, {name}", "ms", each["predicted"], each["milliseconds"])
        for case in cases
        for name, each in case["candidates"].items()
        if each["predicted"] is not None
    ]
    return {"cluster": cluster, "cases": cases, "planned": [asdict(check) for check in planned]}


def _case(
    shape: LayerShape, options: argparse.Namespace, device: torch.device, cluster: dict[str, Any]
) -> dict[str, Any]:
    tokens = 48 if options.tiny else options.tokens
    inputs = [_on(device, *random_tokens(shape, tokens, DTYPE, seed)) for seed in range(INPUT_SETS)]
    same, failed = those_that_run(transformers_layers(shape, DTYPE, tokens), *inputs[0])
    equal = {name: layer.to(device) for name, layer in build_layers(shape, ep=1, ep_rank=0).items()} | same
    wrong = differences(equal, *inputs[0])
    dispatchers = ("allgather", "alltoall") if device.type == "cuda" else ("allgather",)
    megatron = {f"megatron {name}": partial(MegatronLayer, shape, DTYPE, name) for name in dispatchers}
    others, unable = those_that_run(megatron, *inputs[0])
    layers: dict[str, nn.Module] = {**equal, **others}
    units = {ALL: shape.experts + 1, CHOSEN: shape.top_k + 1}
    for name, experts in units.items():
        layers[name] = Products(shape.hidden_size, experts * shape.bottleneck, DTYPE).to(device)
    passes = 1 if options.tiny else options.passes
    runs = {name: _passes(layer, inputs, passes) for name, layer in layers.items()}
    timings = interleaved(runs, options.rounds, device, options.warm_up)
    predicted = layer_prediction(shape, tokens, cluster)
    found = {}
    for name, rounds in timings.items():
        trace = traced(runs[name], device)
        seconds = [each.device / passes for each in rounds]
        found[name] = {
            "milliseconds": median_milliseconds(seconds),
            "least": min(seconds) * 1e3,
            "most": max(seconds) * 1e3,
            "host": median_milliseconds(each.host / passes for each in rounds),
            "busy": trace.busy / passes * 1e3,
            "kernels": len(trace.kernels) / passes,
            "predicted": predicted.get(name),
            "differs": wrong.get(name),
        }
    return {"tokens": tokens, **asdict(shape), "passes": passes, "candidates": found, "failed": failed | unable}


def _on(device: torch.device, hidden_TH: Tensor, gradient_TH: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_TH.detach().to(device).requires_grad_(), gradient_TH.to(device)


def _passes(layer: nn.Module, inputs: Sequence[tuple[Tensor, Tensor]], passes: int) -> Callable[[], None]:
    """Some forward and backward passes, one behind the other as in a step, over inputs that take turns."""
    each = [one_pass(layer, *pair) for pair in inputs]
    turns = itertools.cycle(each)

    def run() -> None:
        for _ in range(passes):
            next(turns)()

    return run
