"""Experts of a form as stacked tensors, and their layout-free initial values.

A parameter's initial value depends only on the seed and its global name (layer, expert number), never on the rank that
holds it, so that every parallel layout starts from the same model. What ends an expert starts at zero: an untrained
MoME module adds nothing to the frozen LLM.
"""

from __future__ import annotations

import math
import zlib
from typing import cast

import torch
from torch import Tensor, nn

from mome_dist.moe.forms.registry import DEFAULT, find_form


class ExpertStack(nn.Module):
    """N experts of a form as stacked fp32 tensors, named as its parts; also the layout-free form in which experts are
    saved.

    Args:
        experts: N.
        hidden_size, bottleneck: H and b.
        expert: name of the form.
    """

    def __init__(self, experts: int, hidden_size: int, bottleneck: int, expert: str = DEFAULT) -> None:
        super().__init__()
        self.form = find_form(expert)
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
            for expert, value in enumerate(self.get_parameter(part.name)):
                value.copy_(initial_value(f"{prefix}.{expert}.{part.name}", tuple(value.shape), seed, part.start))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Sum of all experts' outputs for every token: [T, H] -> [T, H], in the same dtype."""
        return self.form.summed(hidden_TH, self.weights())


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
