"""The trained tensors of a rank, each with its description: where its numbers are, and how the ranks share them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mome_dist.sharing import Sharing


def _parallel_state() -> Any:
    """Megatron-Core's: what only decodes or exports describes its tensors without it, and may lack it."""
    from megatron.core import parallel_state

    return parallel_state


@dataclass(frozen=True)
class NamedPart:
    """A tensor of the layout-free model in a local parameter: the whole of it, one expert's row, or this rank's slice.

    Attributes:
        name: of the tensor in the layout-free model.
        index: which of the routed experts (`Sharing.experts` of them) it belongs to; None for the whole tensor.
        parameter: that holds it, maybe beside others (or a buffer).
        start: its first element in the parameter, in row-major order.
        shape: its own, of what is here.
        sharing: how the ranks share it.
    """

    name: str
    index: int | None
    parameter: Tensor
    start: int
    shape: tuple[int, ...]
    sharing: Sharing

    @classmethod
    def whole(cls, name: str, parameter: Tensor, sharing: Sharing) -> NamedPart:
        """A parameter that is one tensor of the layout-free model, or a slice of one."""
        return cls(name, None, parameter, 0, tuple(parameter.shape), sharing)

    @property
    def stop(self) -> int:
        """The element of the parameter after its last one."""
        return self.start + math.prod(self.shape)

    @property
    def label(self) -> str:
        """Name and index in words."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def value(self) -> Tensor:
        """A view of its numbers, without gradient."""
        return self.of(self.parameter.detach())

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, or of the expert's row of it, in the layout-free model."""
        return self.sharing.whole_shape(self.shape, _parallel_state().get_tensor_model_parallel_world_size())

    def of(self, values: Tensor) -> Tensor:
        """Its part of something shaped like the parameter, such as a gradient or a moment; a view if that is
        contiguous."""
        return values.reshape(-1)[self.start : self.stop].view(self.shape)

    def gathered(self, values: Tensor) -> Tensor:
        """The layout-free tensor's part, of `whole_shape`, of something shaped like the parameter. Where it is sliced,
        a collective of the tensor-parallel ranks."""
        mine = self.of(values).detach()
        if self.sharing.sliced is None:
            return mine
        group = _parallel_state().get_tensor_model_parallel_group()
        mine = mine.contiguous()
        slices = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slices, mine, group=group)
        return torch.cat(slices, dim=self.sharing.sliced)

    def here(self, whole: Tensor) -> Tensor:
        """What this rank holds of a tensor of `whole_shape`."""
        if self.sharing.sliced is None:
            return whole
        state = _parallel_state()
        ranks, rank = state.get_tensor_model_parallel_world_size(), state.get_tensor_model_parallel_rank()
        return whole.chunk(ranks, dim=self.sharing.sliced)[rank]

    @property
    def copies(self) -> dist.ProcessGroup:
        """The data-parallel ranks that hold copies of it, or under ZeRO parts of its optimiser state."""
        if self.sharing.experts is None:
            return _parallel_state().get_data_parallel_group()
        name = getattr(self.parameter, "group_name")  # noqa: B009  DeepSpeed asks for it
        # Experts alone need it: what only decodes is not to wait for DeepSpeed's import.
        from deepspeed.utils import groups as deepspeed_groups

        return deepspeed_groups._get_expert_data_parallel_group(name)

    @property
    def gathered_here(self) -> bool:
        """Whether this rank is one of those (tensor-parallel ones) that together save it."""
        return dist.get_rank(self.copies) == 0

    @property
    def saved_here(self) -> bool:
        """Whether this rank is the one that writes it: the first of those that hold copies, or slices, of it."""
        return self.gathered_here and _parallel_state().get_tensor_model_parallel_rank() == 0


class Described(Protocol):
    """A module that trains and says of each of its tensors how ranks share it."""

    def named_parts(self, prefix: str) -> Iterator[NamedPart]:
        """Its tensors, of names that begin with ``prefix`` and go on as `named_parameters` has them."""


def whole_parts(prefix: str, module: nn.Module, sharing: Sharing) -> Iterator[NamedPart]:
    """The parameters of a module that are all shared alike."""
    for name, parameter in module.named_parameters():
        yield NamedPart.whole(f"{prefix}.{name}", parameter, sharing)


def by_parameter(parts: Iterable[NamedPart]) -> dict[Tensor, list[NamedPart]]:
    """The parts that each parameter holds."""
    found: dict[Tensor, list[NamedPart]] = {}
    for part in parts:
        found.setdefault(part.parameter, []).append(part)
    return found
