"""Messages between pipeline stages that share GPUs, through the memory of the host.

gloo's collectives copy GPU tensors to the host themselves; its point-to-point messages read the tensor's address as one
of the host, and fail. Megatron-Core's pipeline sends those. This is the only module that changes it for that, where
``MOME_DIST_BACKEND=gloo`` lets ranks share GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor


class _Operation(NamedTuple):
    """Stands for `torch.distributed.P2POp`."""

    op: Any
    tensor: Tensor
    peer: int
    group: dist.ProcessGroup | None = None


class _Arrival:
    """A message on its way into a tensor, which holds it once `wait` returns."""

    def __init__(self, work: dist.Work, buffer: Tensor, tensor: Tensor) -> None:
        self._work, self._buffer, self._tensor = work, buffer, tensor

    def wait(self) -> None:
        self._work.wait()
        self._tensor.copy_(self._buffer)


def _isend(tensor: Tensor, dst: int, group: dist.ProcessGroup | None = None) -> dist.Work | None:
    return dist.isend(tensor.detach().to("cpu", copy=True).contiguous(), dst, group)


def _irecv(tensor: Tensor, src: int, group: dist.ProcessGroup | None = None) -> _Arrival:
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    work = dist.irecv(buffer, src, group)
    assert work is not None, "this rank is in the group of its pipeline"
    return _Arrival(work, buffer, tensor)


def _batch(operations: Sequence[_Operation]) -> list[Any]:
    return [each.op(each.tensor, each.peer, each.group) for each in operations]


class _Names:
    """Stands for a module, some of whose names are others."""

    def __init__(self, module: Any, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def messages_over_the_host() -> Iterator[None]:
    """Inside the block, Megatron-Core's pipeline sends copies in the host's memory and receives into such."""
    staged = _Names(dist, isend=_isend, irecv=_irecv, P2POp=_Operation, batch_isend_irecv=_batch)
    before, p2p_communication.torch = p2p_communication.torch, _Names(torch, distributed=staged)
    try:
        yield
    finally:
        p2p_communication.torch = before
