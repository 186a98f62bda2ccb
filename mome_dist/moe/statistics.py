"""Counts of what the router did, by view: tokens, padding, routes to each expert, and routes lost to capacity.

A module counts on its own device and only adds up: nothing is copied to the host or sent to other ranks until `take`.
What it adds comes from the dispatch, which has gathered the counts of all ranks that hold other tokens anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def first_pass() -> bool:
    """Whether this forward pass is not a recomputation of activations, which runs inside the backward pass.

    Whether gradients are enabled cannot tell: a recomputed part runs first without them and then with them, and by then
    later microbatches of the pipeline, in other views, have been through.
    """
    return torch._C._current_graph_task_id() == -1


class RoutingStatistics:
    """Running counts of one module since the last `take`.

    Attributes:
        view: of the microbatch that runs now, set from outside; counts are kept apart by it.
    """

    def __init__(self) -> None:
        self.view = ""
        self._loads: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}

    def add(self, load_X: Tensor, dropped_E: Tensor | None) -> None:
        """Count one forward pass.

        Args:
            load_X: int64 [E + 2], routes asked for by expert, then tokens, then positions (tokens and padding).
            dropped_E: int64 [E], routes of them that got no slot; None if nothing can be dropped.
        """
        _accumulate(self._loads, self.view, load_X)
        if dropped_E is not None:
            _accumulate(self._dropped, self.view, dropped_E)

    def take(self) -> dict[str, Tensor]:
        """By view, int64 [2E + 2]: asked, dropped, tokens, positions. Starts again from zero."""
        loads, dropped = self._loads, self._dropped
        self._loads, self._dropped = {}, {}
        taken = {}
        for view, load_X in loads.items():
            asked_E, rest_2 = load_X[:-2], load_X[-2:]
            taken[view] = torch.cat([asked_E, dropped.get(view, torch.zeros_like(asked_E)), rest_2])
        return taken


def _accumulate(sums: dict[str, Tensor], view: str, counts: Tensor) -> None:
    if view in sums:
        sums[view] += counts
    else:
        sums[view] = counts.clone()


@dataclass(frozen=True)
class RoutingCounts:
    """Counts of all layers, over all ranks.

    Attributes:
        views: names, in the order of the first axis.
        packed_VLX: int64 [views, layers, 2E + 2] on the CPU, as `RoutingStatistics.take` packs them.
    """

    views: tuple[str, ...]
    packed_VLX: Tensor

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        assert self.views == other.views, "counts of different runs"
        return RoutingCounts(self.views, self.packed_VLX + other.packed_VLX)

    def record(self, *views: str) -> dict[str, Any]:
        """The counts of some views together, of all if none is named, for JSON.

        Returns:
            ``tokens`` and ``positions`` (padding included), the same in every layer; ``asked``, routes to each expert,
            a token counting once for each of its top-K and padding never, and ``dropped``, routes of them that an
            expert over capacity lost, each [layers][experts].
        """
        packed_LX = self.packed_VLX[[self.views.index(view) for view in views or self.views]].sum(dim=0)
        experts = packed_LX.shape[1] // 2 - 1
        asked_LE, dropped_LE, sizes_L2 = packed_LX.split([experts, experts, 2], dim=1)
        tokens, positions = sizes_L2[0].tolist()
        return {
            "tokens": tokens,
            "positions": positions,
            "asked": asked_LE.tolist(),
            "dropped": dropped_LE.tolist(),
        }

    def by_view(self) -> dict[str, dict[str, Any]]:
        """The `record` of each view that had a microbatch."""
        records = {view: self.record(view) for view in self.views}
        return {view: record for view, record in records.items() if record["positions"]}
