"""Bottleneck experts ``E(h) = up(GELU(down(h)))`` and their layout-free initial values.

A parameter's initial value depends only on the seed and its global name (layer, expert number), never on the rank that
holds it, so that every parallel layout starts from the same model. ``up`` starts at zero: an untrained MoME module adds
nothing to the frozen LLM.
Source: MoME (arXiv 2510.04136); both linear maps have a bias.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """One expert: Linear(H -> b), GELU, Linear(b -> H). Parameters are fp32; arithmetic is in the input's dtype."""

    def __init__(self, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        dtype = hidden.dtype
        narrow = F.gelu(F.linear(hidden, self.down.weight.to(dtype), self.down.bias.to(dtype)))
        return F.linear(narrow, self.up.weight.to(dtype), self.up.bias.to(dtype))


class ExpertStack(nn.Module):
    """N bottleneck experts as stacked tensors; also the layout-free form in which experts are saved.

    ``down_weight`` [N, b, H], ``down_bias`` [N, b], ``up_weight`` [N, H, b], ``up_bias`` [N, H], all fp32.
    """

    def __init__(self, experts: int, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.empty(experts, hidden_size, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden_size))

    def activations(self, hidden_TH: Tensor) -> Tensor:
        """All experts' GELU activations in one matrix product: [T, H] -> [T, N, b], in the input's dtype."""
        experts, bottleneck, hidden_size = self.down_weight.shape
        weight, bias = self.down_weight.reshape(-1, hidden_size), self.down_bias.reshape(-1)
        flat = F.linear(hidden_TH, weight.to(hidden_TH.dtype), bias.to(hidden_TH.dtype))
        return F.gelu(flat).view(-1, experts, bottleneck)

    def combine(self, activations_TNb: Tensor, gates_TN: Tensor) -> Tensor:
        """Gate-weighted sum of all experts' outputs in one matrix product: -> [T, H], in the activations' dtype."""
        dtype = activations_TNb.dtype
        weight_HNb = self.up_weight.permute(1, 0, 2).flatten(1).to(dtype)
        gated = (activations_TNb * gates_TN[..., None]).flatten(1)
        return F.linear(gated, weight_HNb) + gates_TN @ self.up_bias.to(dtype)


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial fp32 value of one expert's (or the router's) tensor.

    Args:
        name: global name of the tensor, with the expert's number where it belongs to one expert.
        shape: ``down`` weights are uniform in +-1/sqrt(H) (H is the last dimension), routers normal with standard
            deviation 0.02, ``up`` weights and all biases zero.
        seed: of the run.
    """
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 16) ^ seed)
    if name.endswith("down_weight"):
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith("router_weight"):
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    return torch.zeros(shape)
