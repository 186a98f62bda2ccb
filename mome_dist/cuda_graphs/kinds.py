"""What captures and replays: torch on a GPU, or its rehearsal."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mome_dist.cuda_graphs.rehearsal import RehearsedGraphs
from mome_dist.cuda_graphs.replay import Function, Graphs
from mome_dist.errors import UserError


class CudaGraphs:
    """`Graphs` of torch, on a GPU."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Function, samples: tuple[Tensor, ...]) -> Function:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        captured = torch.cuda.make_graphed_callables(function, samples, allow_unused_input=True, pool=self._pool)
        return cast(Function, captured)


def graphs_of(kind: str, device: torch.device) -> Graphs:
    """What makes graphs under a value of ``llm.graphs``.

    Args:
        kind: "cuda" or "rehearsal".

    Raises:
        UserError: for CUDA graphs without a GPU.
    """
    if kind == "rehearsal":
        return RehearsedGraphs()
    if device.type != "cuda":
        raise UserError(
            "llm.graphs=cuda needs a GPU, and this run has none: set llm.graphs=none (llm.graphs=rehearsal checks on "
            "any device what a graph needs, and is slower)."
        )
    return CudaGraphs()
