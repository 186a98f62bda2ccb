"""Counts of what the routers did, by view: tokens, positions, routes to each expert, and routes lost to capacity.

Counts are summed on the device that holds them, and over ranks once a pass (`mome_dist.moe.load`): nothing is copied to
the host until `take`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mome_dist.moe.load import PassLoad


class RoutingStatistics:
    """Running counts of the modules of a stage since the last `take`.

    Attributes:
        step_load: by view, int64 [L, E], routes to each expert in the passes since it was last cleared, over the global
            batch.
    """

    def __init__(self) -> None:
        self.step_load: dict[str, Tensor] = {}
        self._waiting: list[PassLoad] = []
        self._sums: dict[str, Tensor] = {}

    def expect(self, load: PassLoad) -> None:
        """Count a pass whose sum over ranks is under way."""
        self._waiting.append(load)

    def settle(self) -> None:
        """Add up what was expected; after the backward passes of a step, when it has arrived."""
        for load in self._waiting:
            counts_LVX = load.all()
            for view, counts_LX in zip(load.views, counts_LVX.unbind(dim=1), strict=True):
                _add(self._sums, view, counts_LX)
                _add(self.step_load, view, counts_LX[:, : counts_LX.shape[1] // 2 - 1])
        self._waiting = []

    def take(self) -> dict[str, Tensor]:
        """By view, int64 [L, 2E + 2]: asked, dropped, tokens, positions. Starts again from zero."""
        sums, self._sums = self._sums, {}
        return sums


def _add(sums: dict[str, Tensor], view: str, counts: Tensor) -> None:
    sums[view] = sums[view] + counts if view in sums else counts


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
            ``tokens`` and ``positions`` (dead tokens included), the same in every layer; ``asked``, routes to each
            expert, a token counting once for each of its top-K and a dead one never, and ``dropped``, routes of them
            that an expert over capacity lost, each [layers][experts].
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
