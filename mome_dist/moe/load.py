"""What the routers of a stage did in one pass: counted layer by layer, summed over ranks once.

The load of the experts enters the balance loss as a constant, so that its value is not needed before the backward
pass. Every layer leaves its counts here; one collective sums those of all layers, beside whatever follows the forward
pass, and the backward pass reads them (`mome_dist.moe.balance`).

Shape suffixes: L modules of the stage; V views; X columns: E routes asked for by expert, E of them dropped, then tokens
and positions (tokens and dead ones).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class PassLoad:
    """Counts of one pass.

    Args:
        views: names, in the order of the first axis of what modules `put`.
        group: the ranks that hold other tokens; None if there are none.
        share: what the auxiliary losses of this pass count for in the step's, with what the engine will divide by.
    """

    def __init__(self, views: tuple[str, ...], group: dist.ProcessGroup | None, share: float = 1.0) -> None:
        self.views, self.group, self.share = views, group, share
        self._put: dict[int, Tensor] = {}
        self._sum_LVX: Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def counting(self) -> bool:
        """Whether modules still count: a pass that is computed again, for its backward pass, was counted before."""
        return self._sum_LVX is None

    def put(self, place: int, counts_VX: Tensor) -> None:
        """Leave the counts of one module, [V, X] of any type that holds whole numbers."""
        self._put[place] = counts_VX

    def reduce(self) -> None:
        """Begin to sum over the ranks, once all modules have counted; all ranks of the group call it."""
        if self._put:
            self._sum_LVX = torch.stack([self._put[place] for place in sorted(self._put)]).long()
            self._put = {}
            if self.group is not None and dist.get_world_size(self.group) > 1:
                self._work = dist.all_reduce(self._sum_LVX, group=self.group, async_op=True)

    def all(self) -> Tensor:
        """int64 [L, V, X], over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self._sum_LVX is not None, "`reduce` comes first"
        return self._sum_LVX

    def of(self, place: int) -> Tensor:
        """int64 [V, X] of one module, over all ranks."""
        return self.all()[place]
