"""The part of `benchmarks.forms` that runs on every rank: one number of processes with each dispatch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from benchmarks.form_options import CASES, OURS, add_case_options
from benchmarks.results import rank_arguments
from mome_dist.moe.forms.registry import find_form
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
    """Figures of one dispatch, the same on all ranks but for the bytes, which are of this one."""
    import torch.distributed as dist

    from benchmarks.layer_candidates import LayerShape, MoMELayer
    from benchmarks.layer_cases import one_pass, random_tokens
    from benchmarks.measuring import DTYPES, WireBytes, interleaved, median_milliseconds

    layers = {}
    for name in dict.fromkeys([OURS, *options.forms]):
        case = CASES[name]
        if dispatch not in find_form(case.form).dispatches:
            continue
        experts = case.experts + -case.experts % ranks
        widths = case.widths(experts)
        shape = LayerShape(options.hidden, experts, case.top_k, case.bottleneck if widths is None else widths.widest)
        layers[name] = MoMELayer(shape, ranks, dispatch, expert=case.form, widths=widths)
        layers[name].mome.initialize("mome.0", 0)
    inputs = random_tokens(shape, options.tokens, DTYPES[options.precision], seed=100 + dist.get_rank())
    passes = {name: one_pass(layer, *inputs) for name, layer in layers.items()}
    sent = {}
    for name, run in passes.items():
        wire = WireBytes()
        with wire.counted():
            run()
        sent[name] = wire.sent
    timings = interleaved(passes, options.rounds, warm_up=options.warm_up)
    forms = {}
    for name, rounds in timings.items():
        seconds = [each.device for each in rounds]
        forms[name] = {
            "milliseconds": median_milliseconds(seconds),
            "least": min(seconds) * 1e3,
            "most": max(seconds) * 1e3,
            "bytes": sent[name],
            "parameters": sum(each.numel() for each in layers[name].mome.parameters()),
        }
    return {
        "processes": ranks,
        "dispatch": dispatch,
        "precision": options.precision,
        "tokens": options.tokens,
        "hidden": options.hidden,
        "forms": forms,
    }


if __name__ == "__main__":
    main()
