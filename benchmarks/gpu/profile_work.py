"""The measuring part of `benchmarks.gpu.profile`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import PAPER, TINY
from benchmarks.gpu.trace import traced
from benchmarks.gpu.training import training_of
from benchmarks.measuring import total
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A trace of some steps, summed up by kernel."""
    sizes = TINY if options.tiny else PAPER
    keep = None
    if options.trace:
        options.results.mkdir(parents=True, exist_ok=True)
        keep = options.results / "gpu_profile_trace.json"
    with tempfile.TemporaryDirectory() as scratch, parallel_world(Layout.for_world(1), 0, 600):
        training = training_of(sizes, Path(scratch), device)
        training.step()  # makes the optimiser's state, and prepares kernels
        untraced = [total(training.step(number)).device for number in range(options.rounds)]

        def steps() -> None:
            for number in range(options.rounds):
                training.step(number)

        trace = traced(steps, device, keep)
        training.close()
    return {
        "device": device.type,
        "steps": options.rounds,
        "step": min(untraced),
        "span": trace.span,
        "busy": trace.busy,
        "idle share": trace.idle_share,
        "host share": trace.host_share,
        "kernels": [
            {"name": name, "calls": len(seconds), "seconds": sum(seconds)} for name, seconds in trace.by_name().items()
        ],
    }
