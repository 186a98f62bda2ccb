"""The measuring part of `benchmarks.gpu.step`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cluster import cluster_record
from benchmarks.gpu.models import PAPER, TINY, configuration, random_encoders
from benchmarks.gpu.predictions import FORMS, peak_flops, predictions, step_checks
from benchmarks.gpu.trace import traced
from benchmarks.gpu.training import PARTS, Training, build_model, engine_of
from benchmarks.measuring import Timing, median_milliseconds, total
from mome_dist.config.schema import RunConfig
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout

FIRST_STEPS = 2  # that make the optimiser's state and reach the peak of memory
GRAPHED = "with MoME, layers in CUDA graphs"


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of all forms."""
    sizes = TINY if options.tiny else PAPER
    with tempfile.TemporaryDirectory() as scratch, parallel_world(Layout.for_world(1), 0, 600), ExitStack() as opened:
        cluster = cluster_record(device, options.tiny)
        config = configuration(sizes, _folder(scratch, "measured"))
        expected = predictions(sizes, cluster, _folder(scratch, "predicted"))
        forms, peaks = {}, {}
        plain, mome, whole = FORMS
        with _peak(device) as found:
            model = build_model(config, False, device)
            forms[plain] = Training(config, sizes, model, engine_of(config, model), {}, device)
            _first_steps(forms[plain])
        peaks[plain] = found()
        with _peak(device) as with_encoders:
            with _peak(device) as found:
                model = build_model(config, True, device)
                engine = engine_of(config, model)
                forms[mome] = Training(config, sizes, model, engine, {}, device)
                _first_steps(forms[mome])
            peaks[mome] = found()
            encoders = random_encoders(config, device)
            forms[whole] = Training(config, sizes, model, engine, encoders, device)
            opened.callback(forms[whole].close)
            _first_steps(forms[whole])
        peaks[whole] = with_encoders()
        if options.graphs:
            in_graphs = _in_graphs(config, forms[mome].tokens, device)
            with _peak(device) as found:
                model = build_model(in_graphs, True, device)
                forms[GRAPHED] = Training(in_graphs, sizes, model, engine_of(in_graphs, model), {}, device)
                _first_steps(forms[GRAPHED])
            peaks[GRAPHED], expected[GRAPHED] = found(), expected[mome]
        rounds: dict[str, list[list[Timing]]] = {form: [] for form in forms}
        for turn in range(options.warm_up + options.rounds):
            for form, training in forms.items():
                parts = training.step(turn)
                if turn >= options.warm_up:
                    rounds[form].append(parts)
        cases = {}
        for form, training in forms.items():
            trace = traced(training.step, device)
            steps = [total(parts) for parts in rounds[form]]
            cases[form] = {
                "milliseconds": {
                    part: median_milliseconds(each.device for each in times)
                    for part, times in zip(PARTS, zip(*rounds[form], strict=True), strict=True)
                },
                "step": median_milliseconds(each.device for each in steps),
                "least": min(each.device for each in steps) * 1e3,
                "most": max(each.device for each in steps) * 1e3,
                "host": median_milliseconds(each.host for each in steps),
                "busy": trace.busy * 1e3,
                "kernels": len(trace.kernels),
                "tokens": training.tokens,
                "bytes": peaks[form],
                "predicted": expected[form],
            }
    graphed = {GRAPHED: cases.pop(GRAPHED)} if options.graphs else {}
    return {
        "cluster": cluster,
        "peak flops": peak_flops(cluster),
        "sizes": "tiny" if options.tiny else "paper",
        "job": asdict(sizes),
        "cases": cases,
        "graphed": graphed,
        "planned": step_checks(cases),
    }


def _folder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / name
    folder.mkdir()
    return folder


def _in_graphs(config: RunConfig, tokens: int, device: torch.device) -> RunConfig:
    """The configuration with the layers in graphs, for passes of so many tokens."""
    kind = "cuda" if device.type == "cuda" else "rehearsal"
    llm = replace(config.llm, graphs=kind)
    return replace(config, llm=llm, data=replace(config.data, microbatch_tokens=tokens))


def _first_steps(training: Training) -> None:
    for number in range(FIRST_STEPS):
        training.step(number)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """The most bytes of tensors beyond those that were there before; None on a CPU, where nobody counts them."""
    if device.type != "cuda":
        yield lambda: None
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before
