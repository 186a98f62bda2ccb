"""Low-rank adaptation (LoRA, Hu et al., 2021) of the linear layers of a frozen encoder.

``W x + b + (alpha / rank) * B (A x)``, with A random and B zero at the start, so that an adapted encoder begins as the
frozen one. Only A and B train. The frozen weights keep their names: an adapted encoder's state is the frozen state and,
beside each adapted ``weight``, a ``lora_a`` and a ``lora_b``.

A and B are fp32 and so are their gradients, which add up over the clips of a step; the term is multiplied in the
precision of the frozen weights, as they are. In fp32 it would take a GPU longer than the layer that it is added to.

Omni-AVSR (arXiv 2511.07253) adapts the query and value projections of AV-HuBERT so. `mome_dist.training.adaptation`
trains the terms. PEFT's layers compute the same (`tests/unit/test_lora.py`) and are not used: they rename the frozen
weights, by whose names encoders are saved and merged.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mome_dist.errors import UserError

QUERY_AND_VALUE = ("q_proj", "v_proj")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank term; it takes over the frozen layer's parameters.

    Attributes:
        rank: of the term.
        scale: ``alpha / rank``.
        lora_a: fp32 [rank, in].
        lora_b: fp32 [out, rank].
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # the weights exist already
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, frozen.bias
        self.rank, self.scale = rank, alpha / rank
        device = frozen.weight.device
        self.lora_a = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in the dtype of ``x``, which is that of the frozen weights."""
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same; the frozen one's parameters are left as they are."""
        plain = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        plain.weight.copy_(self.weight.float() + self.scale * self.lora_b @ self.lora_a)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.requires_grad_(False)


def attach_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = QUERY_AND_VALUE, seed: int = 0
) -> list[str]:
    """Adapt every linear layer of a model whose name ends in one of ``targets``.

    The model is frozen but for the new parameters. Initial values depend on the seed and each layer's name only, so
    that all ranks of a job start alike.

    Args:
        model: changed in place; an encoder keeps its mode.
        rank: of every term, at least 1.
        alpha: the term is scaled by ``alpha / rank``.
        targets: last parts of layers' names, e.g. ``("q_proj", "v_proj")``.
        seed: of the initial values of A.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: if the rank is below 1, a target names no linear layer, or the model is adapted already.
    """
    if rank < 1:
        raise UserError(f"lora rank={rank}: must be at least 1.")
    if lora_layers(model):
        raise UserError("The model has a LoRA already: merge it first.")
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets
    ]
    if absent := sorted(set(targets) - {name.rpartition(".")[2] for name in names}):
        raise UserError(f"lora targets: the model has no linear layer named {absent[0]!r}.")
    model.requires_grad_(False)
    for name in names:
        frozen = model.get_submodule(name)
        assert isinstance(frozen, nn.Linear)
        layer = LoRALinear(frozen, rank, alpha).train(frozen.training)
        generator = torch.Generator().manual_seed((zlib.crc32(f"lora.{name}".encode()) << 16) ^ seed)
        bound = 1 / math.sqrt(layer.in_features)  # as a linear layer starts
        with torch.no_grad():
            layer.lora_a.copy_(torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator))
        _replace(model, name, layer)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


class LoRATerms(nn.Module):
    """A and B of adapted encoders, and nothing of what is frozen: the encoders' own parameters.

    A parameter is called ``STREAM.LAYER.lora_a`` or ``.lora_b``, with the layer's name in its encoder. They are in the
    order of the names, numbers by value, so that the order follows from the names alone.

    Args:
        encoders: by stream; those without LoRA add nothing.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        layers = {
            f"{stream}.{name}": layer
            for stream, encoder in encoders.items()
            for name, layer in lora_layers(encoder).items()
        }
        for path in sorted(layers, key=_by_number):
            place: nn.Module = self
            for name in path.split("."):
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            place.register_parameter("lora_a", layers[path].lora_a)
            place.register_parameter("lora_b", layers[path].lora_b)

    @classmethod
    def of(cls, encoders: Mapping[str, nn.Module]) -> LoRATerms | None:
        """The terms of encoders, None if they have none."""
        return cls(encoders) if any(map(lora_layers, encoders.values())) else None


def _by_number(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(name)) if name.isdigit() else (1, name) for name in path.split(".")]


def merge_lora(model: nn.Module) -> None:
    """Replace every adapted layer by a plain one that computes the same."""
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.merged().train(layer.training))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
