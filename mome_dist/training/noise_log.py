"""Which noise training heard: ``noise/rank-N.jsonl`` of a run, written by the ranks that encode.

A line is what `mome_dist.data.noise.add` says of a clip, with the ``step`` that it was heard in.
Which rank writes a line depends on the layout, and the lines of all ranks together do not. Like those of
``metrics.jsonl``, lines after the checkpoint that a run resumes from are dropped: their steps are trained again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mome_dist.parallel.whereabouts import wait_for_all
from mome_dist.training.metrics import keep_until

FOLDER = "noise"


class NoiseLog:
    """This rank's file, for the steps after ``start``; every rank of the world makes one.

    Raises:
        UserError: if a file of an earlier try holds something else.
    """

    def __init__(self, run: Path, start: int) -> None:
        folder, rank = run / FOLDER, dist.get_rank()
        if rank == 0:
            folder.mkdir(exist_ok=True)
            for path in sorted(folder.glob("rank-*.jsonl")):  # an earlier try may have had more ranks
                keep_until(path, start)
        wait_for_all("cutting the noise logs")
        self._path = folder / f"rank-{rank}.jsonl"

    def step(self, step: int, mixtures: Sequence[Mapping[str, Any]]) -> None:
        """Append the clips of a step."""
        # In one write: a run that is killed leaves at most one line unfinished.
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps({'step': step, **mixture})}\n" for mixture in mixtures))
