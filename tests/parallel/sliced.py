"""A trained module with every way in which tensor-parallel ranks share a tensor: none of the project is sliced.

Beside the feed-forward network of a layer: ``up(gelu(down(low(h))))``, where ``low`` is whole on every rank and sees
its own tokens, ``down`` is cut by columns and ``up`` by rows, as Megatron-Core cuts the linear layers of a network
(arXiv 1909.08053), and a bias is whole behind the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.model import build
from mome_dist.model.distributed import Chunk
from mome_dist.moe.experts import initial_value
from mome_dist.moe.forms.base import part_order
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing
from mome_dist.verification import run

RANK, UNITS, SEED = 3, 8, 5
SLICED = {"down_weight": 0, "down_bias": 0, "up_weight": 1}  # the dimension of each


def whole_values(prefix: str, hidden_size: int) -> dict[str, Tensor]:
    """Initial values by name; some are zero, as those of many modules are, and are then woken by the probe."""
    shapes = {
        "low_weight": (RANK, hidden_size),
        "down_weight": (UNITS, RANK),
        "down_bias": (UNITS,),
        "up_weight": (hidden_size, UNITS),
        "up_bias": (hidden_size,),
    }
    scale = {"low_weight": 1.0, "down_weight": 1.0}
    return {
        name: scale.get(name, 0.0) * initial_value(f"{prefix}.{name}.down_weight", shape, SEED, "uniform")
        for name, shape in shapes.items()
    }


class PlainAdapter(nn.Module):
    """The one-process form, in plain torch."""

    low_weight: Tensor
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, prefix: str, hidden_size: int) -> None:
        super().__init__()
        for name, value in sorted(whole_values(prefix, hidden_size).items(), key=lambda named: part_order(named[0])):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, hidden: Tensor) -> Tensor:
        units = F.gelu(F.linear(F.linear(hidden, self.low_weight), self.down_weight, self.down_bias))
        return F.linear(units, self.up_weight, self.up_bias)


class SlicedAdapter(PlainAdapter):
    """The form of a tensor-parallel rank."""

    def __init__(self, prefix: str, layer: int, hidden_size: int, sequence_parallel: bool) -> None:
        nn.Module.__init__(self)
        self.layer, self.sequence_parallel = layer, sequence_parallel
        for name, value in sorted(whole_values(prefix, hidden_size).items(), key=lambda named: part_order(named[0])):
            part = NamedPart.whole(name, value, self._sharing(name))
            self.register_parameter(name, nn.Parameter(part.here(value).clone()))

    def _sharing(self, name: str) -> Sharing:
        return Sharing(self.layer, sliced=SLICED.get(name), partial=name not in SLICED)

    def named_parts(self, prefix: str) -> Iterator[NamedPart]:
        for name, parameter in self.named_parameters():
            yield NamedPart.whole(f"{prefix}.{name}", parameter, self._sharing(name))

    def forward(self, hidden_N1H: Tensor) -> Tensor:
        low = F.linear(hidden_N1H, self.low_weight)
        if self.sequence_parallel:
            low = mappings.gather_from_sequence_parallel_region(low)
        else:
            low = mappings.copy_to_tensor_model_parallel_region(low)
        output = F.linear(F.gelu(F.linear(low, self.down_weight, self.down_bias)), self.up_weight)
        if self.sequence_parallel:
            output = mappings.reduce_scatter_to_sequence_parallel_region(output)
        else:
            output = mappings.reduce_from_tensor_model_parallel_region(output)
        return output + self.up_bias


def attach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an adapter into every layer of each model that is built, in both forms."""
    built, reference = build.Chunk, run.build_reference

    def with_adapters(llm: Any, projectors: Any, momes: Any, others: dict[str, nn.Module], *more: Any) -> Chunk:
        adapters = dict(others)
        for layer in llm.decoder.layers:
            number = layer.layer_number - 1
            adapter = SlicedAdapter(f"adapter.{number}", number, llm.config.hidden_size, llm.config.sequence_parallel)
            adapters[f"adapter.{number}"] = adapter.to(next(llm.parameters()).device)
            _beside(layer.mlp, adapter)
        return built(llm, projectors, momes, adapters, *more)

    def reference_with_adapters(*args: Any, **kwargs: Any) -> Any:
        model = reference(*args, **kwargs)
        model.adapter = nn.ModuleList()
        for number, layer in enumerate(model.llm.model.layers):
            model.adapter.append(PlainAdapter(f"adapter.{number}", model.llm.config.hidden_size))
            _beside(layer.mlp, model.adapter[number])
        return model

    monkeypatch.setattr(build, "Chunk", with_adapters)
    monkeypatch.setattr(run, "build_reference", reference_with_adapters)


def _beside(network: nn.Module, adapter: nn.Module) -> None:
    """Add what an adapter gives for the input of a network to its output, without owning it."""
    network.register_forward_hook(lambda _network, args, output: output + adapter(args[0]))
