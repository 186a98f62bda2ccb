"""What turns a compressed feature into a token: Linear, ReLU, Linear and, unless it is left out, LayerNorm; of one
projector, or of all experts of a pool in the same few products.

Shape suffixes: T tokens, E experts, d inputs, H outputs.
Source: Llama-AVSR (arXiv 2409.12319), whose code has the norm as an option; Llama-SMoP (arXiv 2505.14336) for experts.
"""

from __future__ import annotations

import functools
import math
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT = ".2"
"""How the name of the second linear map ends."""


class ExpertLinears(nn.Module):
    """A linear map of each expert, as `torch.nn.Linear`.

    Args:
        experts: E.
        in_features, out_features: of each map.
    """

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(experts, out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """[T, d] that all experts read, or [E, T, d] -> [E, T, outputs]."""
        if inputs.dim() == 2:
            outputs = F.linear(inputs, self.weight.flatten(0, 1), self.bias.flatten())
            return outputs.unflatten(1, self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], inputs, self.weight.mT)


class ExpertNorms(nn.Module):
    """The layer norm of each expert, as `torch.nn.LayerNorm`.

    Args:
        experts: E.
        features: H.
    """

    def __init__(self, experts: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, features))
        self.bias = nn.Parameter(torch.zeros(experts, features))

    def forward(self, inputs_ETH: Tensor) -> Tensor:
        """[E, T, H] -> [E, T, H]."""
        normalised_ETH = F.layer_norm(inputs_ETH, inputs_ETH.shape[-1:])
        return torch.addcmul(self.bias[:, None], normalised_ETH, self.weight[:, None])


def perceptron(
    input_size: int, projector_size: int, hidden_size: int, layer_norm: bool, experts: int | None = None
) -> nn.Sequential:
    """One projector, or with ``experts`` a pool of so many, [T, d] -> [E, T, H].

    Args:
        input_size: d.
        projector_size: width between the two linear maps.
        hidden_size: H, of the LLM.
    """
    linear = nn.Linear if experts is None else functools.partial(ExpertLinears, experts)
    layers: list[nn.Module] = [linear(input_size, projector_size), nn.ReLU(), linear(projector_size, hidden_size)]
    if layer_norm:
        layers.append(nn.LayerNorm(hidden_size) if experts is None else ExpertNorms(experts, hidden_size))
    return nn.Sequential(*layers)


@torch.no_grad()
def initialize(module: nn.Module, prefix: str, seed: int, scale: float, layer_norm: bool) -> None:
    """Set initial values of the perceptrons and routers in a module, which depend on the seed and each parameter's name
    only.

    Tokens start at about the root mean square ``scale``, that of the LLM's embeddings; those of a mixture, each a mean
    over experts, somewhat below. A layer norm's weight starts at it. Without a layer norm, the second linear map starts
    ``sqrt(18) * scale`` times as large as torch would have it: weights that are uniform within one over the root of
    their number divide a mean square by three, twice, and ReLU halves it, so that features of root mean square one,
    which is about what encoders give, would leave at ``1 / sqrt(18)``. That is how public code starts. It lets speech
    in at a quarter of the features' size, whatever the size of the embeddings, to which the frozen layers are used:
    where these are much smaller, what the layers add to speech tokens would hardly be seen.

    Args:
        prefix: of the parameters' names in the layout-free model.
        scale: root mean square of the LLM's embeddings.
        layer_norm: whether perceptrons end in one.
    """
    for name, parameter in module.named_parameters():
        place = name.rpartition(".")[0]
        layer = module.get_submodule(place)
        if isinstance(layer, nn.LayerNorm | ExpertNorms):
            parameter.fill_(scale if name.endswith("weight") else 0.0)
            continue
        assert isinstance(layer, nn.Linear | ExpertLinears)
        bound = 1 / math.sqrt(layer.in_features)
        if place.endswith(OUTPUT) and not layer_norm:
            bound *= math.sqrt(18) * scale
        generator = torch.Generator().manual_seed((zlib.crc32(f"{prefix}.{name}".encode()) << 16) ^ seed)
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
