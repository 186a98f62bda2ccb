"""The part of `benchmarks.routers` that runs on every rank: one number of processes with each dispatch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from benchmarks.results import rank_arguments
from benchmarks.router_options import OURS, TOP_K, add_case_options
from mome_dist.moe.routers.registry import ROUTERS
from mome_dist.quiet import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every dispatch and let rank 0 write the figures."""
    options = rank_arguments(__doc__, add_case_options, arguments)
    quiet_libraries()
    import torch

    from benchmarks.measuring import machine
    from mome_dist.files import write_json
    from mome_dist.parallel.initialize import parallel_world
    from mome_dist.parallel.layout import Layout

    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    with parallel_world(Layout.for_world(ranks, ep=ranks), 0, timeout_seconds=600):
        described = machine()
        dispatches = ("alltoall", "local" if ranks == 1 else "gather")
        cases = [_measure(dispatch, ranks, options) for dispatch in dispatches]
        if os.environ["RANK"] == "0":
            write_json(options.figures, {"machine": described, "cases": cases})


def _measure(dispatch: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one dispatch, the same on all ranks but for the experts a token, which are of this one."""
    import torch.distributed as dist

    from benchmarks.layer_candidates import LayerShape, MoMELayer
    from benchmarks.layer_cases import one_pass, random_tokens
    from benchmarks.measuring import DTYPES, interleaved, median_milliseconds
    from mome_dist.moe.routers.spec import RouterSpec
    from mome_dist.speech.views import View
    from mome_dist.token_context import Modality, TokenContext

    hidden_size, bottleneck, experts = map(int, options.shape.split("x"))
    experts += -experts % ranks
    view, audio, video = View("avsr", 4, 2), options.tokens // 2, options.tokens // 4
    modality = [Modality.AUDIO] * audio + [Modality.VIDEO] * video
    modality += [Modality.TEXT] * (options.tokens - len(modality))
    tokens = TokenContext.of([(str(view), [options.tokens])], modality, multiple=1, draws=[0])
    layers = {}
    for name in dict.fromkeys([OURS, *options.routers]):
        kind = ROUTERS[name].settings
        if dispatch not in kind.dispatches:
            continue
        spec = RouterSpec(name, kind(), kind.scores[0], kind.renormalizes[0], views=(view,))
        top_k = kind.only_top_k or (2 * TOP_K if name == "null_experts" else TOP_K)
        shape = LayerShape(hidden_size, experts, top_k, bottleneck)
        layers[name] = MoMELayer(shape, ranks, dispatch, spec, tokens)
        layers[name].mome.initialize("mome.0", 0)
    inputs = random_tokens(shape, options.tokens, DTYPES[options.precision], seed=100 + dist.get_rank())
    passes = {name: one_pass(layer, *inputs) for name, layer in layers.items()}
    timings = interleaved(passes, options.rounds, warm_up=options.warm_up)
    routers = {}
    for name, rounds in timings.items():
        seconds = [each.device for each in rounds]
        asked_E = layers[name].load.of(0)[0, :experts]
        routers[name] = {
            "milliseconds": median_milliseconds(seconds),
            "least": min(seconds) * 1e3,
            "most": max(seconds) * 1e3,
            "used": float(asked_E.sum()) / (options.tokens * ranks),
        }
    return {
        "processes": ranks,
        "dispatch": dispatch,
        "precision": options.precision,
        "tokens": options.tokens,
        "shape": [hidden_size, bottleneck, experts],
        "routers": routers,
    }


if __name__ == "__main__":
    main()
