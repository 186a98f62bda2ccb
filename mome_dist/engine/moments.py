"""The optimiser's running averages ("moments") by parameter, whole or partitioned by ZeRO.

ZeRO 1 and 2 lay the parameters of a group one after the other into a flat tensor, cut it into equal parts, and give
each data-parallel rank the optimiser state of one part. Here a parameter's state is found in those parts again: read by
one all-gather a group instead of one collective a parameter, written without any.
Source: ZeRO (arXiv 1910.02054); the attributes are those of DeepSpeed's `DeepSpeedZeroOptimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mome_dist.nvidia_apex import is_fused_adam


class Moments(Protocol):
    """State of an optimiser, one fp32 tensor for each parameter and name ("exp_avg", "exp_avg_sq")."""

    def whole(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter of this rank with its moment, in the parameter's shape (collective: exhaust it).

        A moment may be a view of a buffer that is alive until the iterator moves on: copy what is kept.
        """

    def held(self, parameter: Tensor, start: int, stop: int, name: str) -> Tensor:
        """What this rank holds of elements ``start`` to ``stop`` of a parameter's moment, flat; maybe none."""

    def fill(self, parameter: Tensor, start: int, name: str, value: Tensor) -> None:
        """Set elements of a moment, from ``start`` on; each rank keeps what it holds."""

    def begin(self, names: tuple[str, ...], steps: int) -> None:
        """Make the state that appears at an optimiser's first step, zero, as after ``steps`` steps."""


class ReplicatedMoments:
    """Without ZeRO each rank has the whole state of its parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def whole(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in self._parameters:
            yield parameter, _state(self._optimizer, parameter, name)

    def held(self, parameter: Tensor, start: int, stop: int, name: str) -> Tensor:
        return _state(self._optimizer, parameter, name).flatten()[start:stop]

    def fill(self, parameter: Tensor, start: int, name: str, value: Tensor) -> None:
        self._optimizer.state[parameter][name].view(-1)[start : start + value.numel()] = value.flatten().to(parameter)

    def begin(self, names: tuple[str, ...], steps: int) -> None:
        _begin(self._optimizer, names, steps)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: its group, and its first element in the group's flat tensor."""

    group: int
    offset: int


class PartitionedMoments:
    """Under ZeRO 1 and 2 each rank has one part of every group's flat state."""

    def __init__(self, zero: Any) -> None:
        self._optimizer: torch.optim.Optimizer = zero.optimizer
        self._parts: list[Tensor] = zero.single_partition_of_fp32_groups
        self._process_groups: list[dist.ProcessGroup] = zero.real_dp_process_group
        self._groups: list[list[Tensor]] = zero.round_robin_bit16_groups
        self._places = {
            parameter: _Place(group, offset)
            for group, parameters in enumerate(self._groups)
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True)
        }

    def whole(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for group, parameters in enumerate(self._groups):
            part, process_group = _state(self._optimizer, self._parts[group], name), self._process_groups[group]
            flat = part.new_empty(part.numel() * dist.get_world_size(process_group))
            dist.all_gather_into_tensor(flat, part.contiguous(), group=process_group)
            for parameter in parameters:
                offset = self._places[parameter].offset
                yield parameter, flat[offset : offset + parameter.numel()].view(parameter.shape)

    def held(self, parameter: Tensor, start: int, stop: int, name: str) -> Tensor:
        part, here, _ = self._overlap(parameter, start, stop)
        return _state(self._optimizer, part, name)[here]

    def fill(self, parameter: Tensor, start: int, name: str, value: Tensor) -> None:
        part, here, there = self._overlap(parameter, start, start + value.numel())
        self._optimizer.state[part][name][here] = value.flatten()[there].to(part)

    def begin(self, names: tuple[str, ...], steps: int) -> None:
        _begin(self._optimizer, names, steps)

    def _overlap(self, parameter: Tensor, start: int, stop: int) -> tuple[Tensor, slice, slice]:
        """This rank's part of the parameter's group; which of its elements are some elements of the parameter; the same
        ones counted from ``start``."""
        place = self._places[parameter]
        part = self._parts[place.group]
        first = dist.get_rank(self._process_groups[place.group]) * part.numel()
        origin = place.offset + start
        begin = max(origin, first)
        end = max(begin, min(place.offset + stop, first + part.numel()))
        return part, slice(begin - first, end - first), slice(begin - origin, end - origin)


def _state(optimizer: torch.optim.Optimizer, held: Tensor, name: str) -> Tensor:
    """State of what the optimiser holds; zero before its first step."""
    state = optimizer.state.get(held, {}).get(name)
    return torch.zeros_like(held) if state is None else state.detach()


def _begin(optimizer: torch.optim.Optimizer, names: tuple[str, ...], steps: int) -> None:
    """State of zero for everything that the optimiser holds, and its own count of steps, which corrects the moments."""
    if not names:
        return
    for group in optimizer.param_groups:
        for held in group["params"]:
            optimizer.state[held] = {name: torch.zeros_like(held, requires_grad=False) for name in names}
            if not is_fused_adam(optimizer):
                optimizer.state[held]["step"] = torch.tensor(float(steps), device=held.device)
        if is_fused_adam(optimizer):
            group["step"] = steps
