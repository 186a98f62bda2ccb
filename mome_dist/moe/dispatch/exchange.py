"""Collectives inside the autograd graph that run beside other work, forward and backward.

An exchange is started early and finished where its result is needed; between the two, the caller computes. Autograd
visits the two nodes in the opposite order, so the backward collective starts where the result was used and is waited
for where the exchange was started: it runs beside the backward pass of the same computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Launch = Callable[[Tensor], "Flight"]


@dataclass
class Flight:
    """A collective under way: what it will have written when ``work`` is done; ``source`` must live until then.
    ``parts`` of equal size are summed when it has landed. Without ``work`` it has."""

    result: Tensor
    source: Tensor
    work: dist.Work | None
    parts: int = 1

    def land(self) -> Tensor:
        """Wait, and return the result."""
        if self.work is not None:
            self.work.wait()
        return self.result if self.parts == 1 else self.result.view(self.parts, -1).sum(dim=0)


class Exchange:
    """One collective with a gradient: `start` it, compute something else, `finish` it.

    Args:
        forward: launches the collective on the input.
        backward: launches the collective that brings the result's gradient back to the input's shape and dtype.
    """

    def __init__(self, forward: Launch, backward: Launch) -> None:
        self.launch_forward, self.launch_backward = forward, backward
        self.flight: Flight | None = None
        self._token: Tensor | None = None

    def start(self, source: Tensor) -> None:
        """Launch the collective."""
        self._token = _Start.apply(source, self)

    def finish(self) -> Tensor:
        """Wait for the result, once."""
        assert self._token is not None, "finish needs a start first"
        token, self._token = self._token, None
        return _Finish.apply(token, self)

    def land(self) -> Tensor:
        assert self.flight is not None, "nothing is under way"
        flight, self.flight = self.flight, None
        return flight.land()


class _Start(torch.autograd.Function):
    """Source -> a scalar that ties `_Finish` to it in the graph. Unfinished buffers never pass through autograd, which
    might read them."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.flight = exchange.launch_forward(source)
        return torch.zeros((), device=source.device)

    @staticmethod
    def backward(ctx: Any, *_token: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.land(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.land()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.flight = ctx.exchange.launch_backward(gradients[0])
        return torch.zeros((), device=gradients[0].device), None


def all_to_all(group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Exchange:
    """Rows go to the ranks of ``group``, the gradients of what came go the same way back.

    Args:
        sent: rows for each rank, which lie in the order of the ranks.
        received: rows from each rank.
    """

    def launch(there: list[int], here: list[int]) -> Launch:
        def start(source: Tensor) -> Flight:
            source = source.contiguous()
            result = source.new_empty(sum(here), *source.shape[1:])
            work = dist.all_to_all_single(result, source, here, there, group=group, async_op=True)
            return Flight(result, source, work)

        return start

    return Exchange(launch(sent, received), launch(received, sent))


def all_gather(group: dist.ProcessGroup, dtype: torch.dtype) -> Exchange:
    """[N] fp32 on each of R ranks -> [R * N] in ``dtype`` on all; gradients are summed over the ranks in fp32."""
    return Exchange(
        lambda source: gathered(source.to(dtype), group),
        lambda gradient: summed_share(gradient.float().contiguous(), group),
    )


def gathered(source_N: Tensor, group: dist.ProcessGroup) -> Flight:
    """[N] on each of R ranks -> [R * N] on all.

    gloo's own gather goes round a ring: with four ranks it takes three times as long as sending N to each.
    """
    ranks = dist.get_world_size(group)
    result = source_N.new_empty(ranks * source_N.numel())
    if dist.get_backend(group) != "gloo":
        return Flight(result, source_N, dist.all_gather_into_tensor(result, source_N, group=group, async_op=True))
    copies = source_N.repeat(ranks)
    return Flight(result, copies, dist.all_to_all_single(result, copies, group=group, async_op=True))


def summed_share(source_N: Tensor, group: dist.ProcessGroup) -> Flight:
    """[R * N] on each of R ranks -> [N], a rank's own part of the sum over ranks.

    gloo's own reduction takes three times as long as sending every rank its parts, to be summed there.
    """
    ranks = dist.get_world_size(group)
    if dist.get_backend(group) != "gloo":
        result = source_N.new_empty(source_N.numel() // ranks)
        return Flight(result, source_N, dist.reduce_scatter_tensor(result, source_N, group=group, async_op=True))
    result = torch.empty_like(source_N)
    return Flight(result, source_N, dist.all_to_all_single(result, source_N, group=group, async_op=True), ranks)
