"""Experts of a form as stacked tensors, and their layout-free initial values.

A parameter's initial value depends only on the seed and its global name (layer, expert number), never on the rank that
holds it, so that every parallel layout starts from the same model. What ends an expert starts at zero: an untrained
MoME module adds nothing to the frozen LLM.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mome_dist.moe.forms.base import Part
from mome_dist.moe.forms.registry import DEFAULT, find_form


class ExpertStack(nn.Module):
    """N experts of a form as stacked fp32 tensors, named as its parts; also the layout-free form in which experts are
    saved.

    Args:
        experts: N.
        hidden_size, bottleneck: H and b.
        expert: name of the form.
        widths: units of each expert, at most b; None for b.
    """

    def __init__(
        self,
        experts: int,
        hidden_size: int,
        bottleneck: int,
        expert: str = DEFAULT,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.form = find_form(expert)
        self.widths = [bottleneck] * experts if widths is None else widths
        for part in self.form.parts:
            shape = part.shape(hidden_size, bottleneck)
            self.register_parameter(part.name, nn.Parameter(torch.empty(experts, *shape)))

    def __len__(self) -> int:
        """N."""
        return len(self.weights()[0])

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters of all experts, in the order of the form's parts."""
        return tuple(cast(dict[str, Tensor], self._parameters).values())

    def first_part(self) -> Tensor:
        """As in `mome_dist.moe.routers.base.ReadableExperts`."""
        return self.weights()[0]

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every layout starts from; experts are called ``prefix`` and their number."""
        for part in self.form.parts:
            for expert, (value, width) in enumerate(zip(self.get_parameter(part.name), self.widths, strict=True)):
                name = f"{prefix}.{expert}.{part.name}"
                value.copy_(initial_part(name, part, tuple(value.shape), seed, width))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Sum of all experts' outputs for every token: [T, H] -> [T, H], in the same dtype."""
        return self.form.summed(hidden_TH, self.weights())


class CommonParts(nn.Module):
    """The tensors that all experts of a layer share, fp32, named as its form names them; none for most forms.

    Args:
        hidden_size, bottleneck, expert: as of `ExpertStack`.
    """

    def __init__(self, hidden_size: int, bottleneck: int, expert: str = DEFAULT) -> None:
        super().__init__()
        self.form = find_form(expert)
        for part in self.form.common:
            self.register_parameter(part.name, nn.Parameter(torch.empty(part.shape(hidden_size, bottleneck))))

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of the form's `common`."""
        return tuple(cast(dict[str, Tensor], self._parameters).values())

    @torch.no_grad()
    def initialize(self, prefix: str, seed: int) -> None:
        """Set the initial values that every layout starts from; the tensors are called ``prefix`` and their name."""
        for part in self.form.common:
            value = self.get_parameter(part.name)
            value.copy_(initial_value(f"{prefix}.{part.name}", tuple(value.shape), seed, part.start))

    def enter(self, hidden_TH: Tensor) -> Tensor:
        """What experts read (`ExpertForm.enter`)."""
        return self.form.enter(hidden_TH, *self.weights())

    def leave(self, output_TD: Tensor) -> Tensor:
        """What the module gives (`ExpertForm.leave`)."""
        return self.form.leave(output_TD, *self.weights())


def initial_part(name: str, part: Part, shape: tuple[int, ...], seed: int, width: int) -> Tensor:
    """`initial_value` of a tensor of an expert that has ``width`` units, with zeros for those that it lacks."""
    return narrowed(initial_value(name, shape, seed, part.start), part, width)


def narrowed(value: Tensor, part: Part, width: int) -> Tensor:
    """A tensor of one expert, or of several with their number first, with zeros for all units after the first
    ``width``; changed in place."""
    ahead = value.dim() - len(part.dims)
    for axis, dim in enumerate(part.dims, ahead):
        if dim == "b":
            value.narrow(axis, width, value.shape[axis] - width).zero_()
    return value


def initial_value(name: str, shape: tuple[int, ...], seed: int, start: str) -> Tensor:
    """The initial fp32 value of one expert's tensor.

    Args:
        name: global name of the tensor, with the expert's number where it belongs to one expert.
        shape: of it.
        seed: of the run.
        start: "uniform" in +-1/sqrt(last dimension), or "zero".
    """
    if start == "zero":
        return torch.zeros(shape)
    assert start == "uniform", start
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) ^ seed)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
