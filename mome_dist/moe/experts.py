"""Bottleneck experts ``E(h) = up(GELU(down(h)))`` and their layout-free initial values.

A parameter's initial value depends only on the seed and its global name (layer, expert number), never on the rank that
holds it, so that every parallel layout starts from the same model. ``up`` starts at zero: an untrained MoME module adds
nothing to the frozen LLM.
Source: MoME (arXiv 2510.04136); both linear maps have a bias.
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExpertWeights(NamedTuple):
    """Weights of N experts, stacked: ``down_weight`` [N, b, H], ``down_bias`` [N, b], ``up_weight`` [N, H, b],
    ``up_bias`` [N, H]; the same fields without N are one expert's."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


class Bottleneck(nn.Module):
    """One expert: Linear(H -> b), GELU, Linear(b -> H). Parameters are fp32; arithmetic is in the input's dtype."""

    def __init__(self, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)

    def weights(self) -> ExpertWeights:
        """The parameters of this expert."""
        return ExpertWeights(self.down.weight, self.down.bias, self.up.weight, self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        dtype = hidden.dtype
        narrow = F.gelu(F.linear(hidden, self.down.weight.to(dtype), self.down.bias.to(dtype)))
        return F.linear(narrow, self.up.weight.to(dtype), self.up.bias.to(dtype))


class ExpertStack(nn.Module):
    """N bottleneck experts as stacked fp32 tensors (`ExpertWeights`); also the layout-free form in which experts are
    saved."""

    def __init__(self, experts: int, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.empty(experts, hidden_size, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(experts, hidden_size))

    def weights(self) -> ExpertWeights:
        """The parameters of all experts."""
        return ExpertWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Sum of all experts' outputs for every token: [T, H] -> [T, H], in the same dtype."""
        gates_TN = torch.ones(hidden_TH.shape[0], self.down_weight.shape[0], device=hidden_TH.device)
        return dense_experts(hidden_TH, self.weights(), gates_TN)


def dense_experts(
    hidden_TH: Tensor, routed: ExpertWeights, gates_TE: Tensor, shared: ExpertStack | None = None
) -> Tensor:
    """Gate-weighted sum of experts as one down-projection of all of them, the gates as a mask, and one up-projection.

    For bottlenecks of a few units this is far less work than sorting tokens by expert, and a token's output never
    depends on its neighbours.

    Args:
        hidden_TH: [T, H].
        routed: weights of E experts.
        gates_TE: fp32 [T, E], zero where an expert is not used.
        shared: experts that every token uses with a gate of one.

    Returns:
        [T, H] in the dtype of ``hidden_TH``, which is also that of the matrix products.
    """
    weights = routed
    if shared is not None:
        weights = ExpertWeights(
            *(torch.cat([part, other.to(part.dtype)]) for part, other in zip(routed, shared.weights(), strict=True))
        )
        ones_TN = gates_TE.new_ones(gates_TE.shape[0], shared.down_weight.shape[0])
        gates_TE = torch.cat([gates_TE, ones_TN], dim=1)
    experts, bottleneck, hidden_size = weights.down_weight.shape
    dtype = hidden_TH.dtype
    down_weight, down_bias = weights.down_weight.reshape(-1, hidden_size), weights.down_bias.reshape(-1)
    narrow = F.gelu(F.linear(hidden_TH, down_weight.to(dtype), down_bias.to(dtype)))
    gated = (narrow.view(-1, experts, bottleneck) * gates_TE[..., None]).flatten(1)
    # The gates are what multiplies the output biases: with them as further inputs one product does it all.
    inputs = torch.cat([gated, gates_TE], dim=1).to(dtype)
    up_weight = torch.cat([weights.up_weight.transpose(0, 1).flatten(1), weights.up_bias.t()], dim=1)
    return F.linear(inputs, up_weight.to(dtype))


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
