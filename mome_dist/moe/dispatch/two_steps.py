"""An all-to-all in two steps: among the ranks of a node, then between nodes.

With G nodes of L ranks, a rank first hands its rows to the rank of its own node that has the receiver's place there;
this one sends what it got for each other node to the one rank with its place in that node. So a rank sends G - 1
messages between nodes instead of (G - 1) L smaller ones, and L - 1 within its node. Rows arrive in the order in which
one step brings them: nothing is added up, and results are the same to the last bit.

Both steps go over the group of all ranks, with no rows for most of them: to send nothing takes no message.

Source: the idea of DeepSpeed-MoE (arXiv 2201.05596) and SMILE (arXiv 2212.05191); here routing knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.moe.dispatch.exchange import Exchange, Flight, Launch
from mome_dist.transfer import sent_to


def all_to_all_in_two_steps(group: dist.ProcessGroup, rows: Sequence[Sequence[int]], mine: int, nodes: int) -> Exchange:
    """As `mome_dist.moe.dispatch.exchange.all_to_all`.

    Args:
        rows: that each rank (first axis) sends to each rank (second axis).
        mine: this rank's place in the group.
        nodes: that divide the group's ranks, which follow each other in a node.
    """
    rows_SD = np.array(rows, dtype=np.int64)
    return Exchange(_launch(group, rows_SD, mine, nodes), _launch(group, rows_SD.T, mine, nodes))


@dataclass
class _TwoSteps(Flight):
    """The first step under way; landing takes the second one."""

    second: Launch | None = None

    def land(self) -> Tensor:
        assert self.second is not None
        return self.second(super().land()).land()


def _launch(group: dist.ProcessGroup, rows_SD: np.ndarray, mine: int, nodes: int) -> Launch:
    """Axes: G nodes, L places in a node; a sender's before a receiver's."""
    ranks = len(rows_SD)
    size = ranks // nodes
    node, place = divmod(mine, size)
    rows_GLGL = rows_SD.reshape(nodes, size, nodes, size)
    sent_GL = rows_GLGL[node, place]
    passed_LG = rows_GLGL[node, :, :, place]  # through this rank, to each node
    received_GL = rows_GLGL[:, :, node, place]
    of_node = slice(node * size, (node + 1) * size)

    def step(source: Tensor, there: np.ndarray, here: np.ndarray, own: slice) -> Flight:
        sizes = np.zeros((2, ranks), dtype=np.int64)
        sizes[0, own], sizes[1, own] = there, here
        result = source.new_empty(int(sizes[1].sum()), *source.shape[1:])
        work = dist.all_to_all_single(result, source, sizes[1].tolist(), sizes[0].tolist(), group=group, async_op=True)
        return Flight(result, source, work)

    def second(passed: Tensor) -> Flight:
        of_place = slice(place, None, size)
        return step(_turned(passed, passed_LG), passed_LG.sum(axis=0), received_GL.sum(axis=1), of_place)

    def first(source: Tensor) -> Flight:
        flight = step(_turned(source, sent_GL), sent_GL.sum(axis=0), passed_LG.sum(axis=1), of_node)
        return _TwoSteps(flight.result, flight.source, flight.work, second=second)

    return first


def _turned(rows: Tensor, sizes_XY: np.ndarray) -> Tensor:
    """Blocks of rows that lie by X, then by Y, as they lie by Y, then by X."""
    starts_XY = sizes_XY.cumsum().reshape(sizes_XY.shape) - sizes_XY
    sizes, starts = sizes_XY.T.flatten(), starts_XY.T.flatten()
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    index = torch.from_numpy(np.repeat(starts, sizes) + within)
    return rows.index_select(0, sent_to(index, rows.device))
