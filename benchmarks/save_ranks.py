"""The part of `benchmarks.save_stall` that runs on every rank."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.results import rank_arguments
from benchmarks.step_ranks import add_step_options
from mome_dist.quiet import quiet_libraries

FORMS = ("no checkpoint", "written between steps", "written beside training")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and let rank 0 write the figures."""
    options = rank_arguments(__doc__, add_step_options, arguments)
    quiet_libraries()
    import torch

    from benchmarks.measuring import machine
    from mome_dist.files import write_json
    from mome_dist.parallel.initialize import parallel_world
    from mome_dist.parallel.layout import Layout

    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    layout = Layout.for_world(ranks, ep=ranks)
    with parallel_world(layout, 0, timeout_seconds=600):
        described = machine()
        figures = _measure(options, layout)
        if os.environ["RANK"] == "0":
            write_json(options.figures, {"machine": described, "cases": [figures]})


def _measure(options: argparse.Namespace, layout: Any) -> dict[str, Any]:
    """Milliseconds that two steps take with and without a checkpoint between them; the forms take turns."""
    import torch
    import torch.distributed as dist

    from benchmarks.measuring import median_milliseconds
    from benchmarks.step_parts import build, random_step, timed_step
    from mome_dist.checkpoint.save import CheckpointSaver
    from mome_dist.config import RunConfig
    from mome_dist.training.run_directory import owned_run

    trained = build("mome", options, layout)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    savers, runs = {}, ExitStack()
    for form in FORMS[1:]:
        config = RunConfig(output_dir=f"{folder[0]}/{form.split()[1]}")
        config.training.async_save = form == FORMS[2]
        savers[form] = CheckpointSaver(config, layout, {}, {}, lambda step: step, runs.enter_context(owned_run(config)))
    waits: dict[str, list[float]] = {form: [] for form in FORMS}
    steps: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(options.warm_up + options.rounds):
        for form in FORMS:
            first = timed_step(trained, random_step(options, number))[-1]
            dist.barrier()
            began = time.perf_counter()
            if form in savers:
                savers[form].save(number, trained.model, trained.engine)
            wait = time.perf_counter() - began
            second = timed_step(trained, random_step(options, number))[-1]
            seconds = torch.tensor([wait, first + wait + second], dtype=torch.float64)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if form in savers:
                savers[form].finish()  # not timed: the next checkpoint is many steps away
            if number >= options.warm_up:
                waits[form].append(float(seconds[0]))
                steps[form].append(float(seconds[1]))
    written = Path(folder[0]).rglob("part-*.safetensors")
    size = sum(path.stat().st_size for path in written if "between" in str(path) and f"{number:06d}" in str(path))
    runs.close()
    dist.barrier()
    if dist.get_rank() == 0:
        import shutil

        shutil.rmtree(folder[0])
    return {
        "processes": dist.get_world_size(),
        "bytes": size,
        "wait": {form: median_milliseconds(times) for form, times in waits.items()},
        "two steps": {form: median_milliseconds(times) for form, times in steps.items()},
    }


if __name__ == "__main__":
    main()
