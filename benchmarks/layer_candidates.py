"""The layers under comparison, all computing the same function from the same weights.

`StockLayer` is DeepSpeed's MoE layer as it comes: its generic top-K gating, which for K = 4 drops nothing when asked,
its loop over experts and its dispatch. Its experts cast their fp32 parameters to the precision of the hidden states,
which plain `nn.Linear` experts refuse; and MoME's shared expert is added to it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from deepspeed.moe.layer import MoE
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layer_ranks import STOCK
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.token_context import TokenContext

BALANCE_LOSS = 0.01


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoME layer: H, routed experts (beside one shared), K, b."""

    hidden_size: int
    experts: int
    top_k: int
    bottleneck: int


class Bottleneck(nn.Module):
    """One expert as DeepSpeed has them, a module with parameters of its own: Linear(H -> b), GELU, Linear(b -> H)."""

    def __init__(self, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        dtype = hidden.dtype
        narrow = F.gelu(F.linear(hidden, self.down.weight.to(dtype), self.down.bias.to(dtype)))
        return F.linear(narrow, self.up.weight.to(dtype), self.up.bias.to(dtype))


class StockLayer(nn.Module):
    """DeepSpeed's layer and a shared expert."""

    def __init__(self, shape: LayerShape, ep: int) -> None:
        super().__init__()
        self.routed = MoE(
            shape.hidden_size,
            Bottleneck(shape.hidden_size, shape.bottleneck),
            num_experts=shape.experts,
            ep_size=ep,
            k=shape.top_k,
            drop_tokens=False,
            enable_expert_tensor_parallelism=True,
        )
        self.routed.set_deepspeed_parallelism()
        self.shared = Bottleneck(shape.hidden_size, shape.bottleneck)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> [T, H] and the weighted balance loss."""
        output_TH, balance, _ = self.routed(hidden_TH)
        return output_TH + self.shared(hidden_TH), BALANCE_LOSS * balance


class MoMELayer(nn.Module):
    """Our layer with one of its dispatches.

    Attributes:
        load: of the latest pass.
    """

    load: PassLoad

    def __init__(self, shape: LayerShape, ep: int, dispatch: str) -> None:
        super().__init__()
        self.mome = ExpertParallelMoME(
            shape.hidden_size,
            shape.experts,
            shape.top_k,
            shared_experts=1,
            bottleneck=shape.bottleneck,
            ep_size=ep,
            dispatch=dispatch,
            balance_loss=BALANCE_LOSS,
        )
        self.mome.set_deepspeed_parallelism()
        self.mome.set_token_group(parallel_state.get_data_parallel_group())

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, None]:
        """[T, H] -> [T, H], whose backward pass adds the gradients of the weighted balance loss."""
        context, group = TokenContext.of([("text", [len(hidden_TH)])], multiple=1), self.mome.deepspeed_moe.token_group
        self.load = PassLoad(context.view_names, group)
        self.mome.prefetch(hidden_TH.dtype)
        output_TH = self.mome(hidden_TH, context, self.load)
        self.load.reduce()
        return output_TH, None


def build_layers(shape: LayerShape, ep: int, ep_rank: int) -> dict[str, StockLayer | MoMELayer]:
    """Every candidate by name, with equal weights: DeepSpeed's layer first, then our dispatches."""
    layers: dict[str, StockLayer | MoMELayer] = {STOCK: StockLayer(shape, ep)}
    for dispatch in ("alltoall", "gather" if ep > 1 else "local"):
        layers[dispatch] = MoMELayer(shape, ep, dispatch)
    for layer in layers.values():
        _fill(layer, ep_rank)
    return layers


def first_expert_gradient(layer: StockLayer | MoMELayer) -> Tensor:
    """The gradient of the down-projection of the first expert that this rank holds: [b, H]."""
    if isinstance(layer, StockLayer):
        return layer.routed.deepspeed_moe.experts.deepspeed_experts[0].down.weight.grad
    experts = layer.mome.deepspeed_moe.experts
    bottleneck, hidden_size = experts.shapes[0]
    return experts.packed.grad[0, : bottleneck * hidden_size].view(bottleneck, hidden_size)


@torch.no_grad()
def _fill(layer: StockLayer | MoMELayer, ep_rank: int) -> None:
    """Give every parameter a value that depends on its global name only."""
    module = layer.routed if isinstance(layer, StockLayer) else layer.mome
    _fill_one("router", module.deepspeed_moe.gate.wg.weight)
    # Both have DeepSpeed's names, whatever holds the numbers.
    experts, first = module.deepspeed_moe.experts, ep_rank * module.num_local_experts
    for name, value in experts.state_dict().items():
        _, number, part = name.split(".", 2)
        _fill_one(f"expert.{first + int(number)}.{part}", value)
    shared = layer.shared if isinstance(layer, StockLayer) else layer.mome.shared
    assert shared is not None
    for name, parameter in shared.named_parameters():
        # Ours is a stack of one with names like down_weight.
        value = parameter if isinstance(layer, StockLayer) else parameter[0]
        _fill_one(f"shared.{name.replace('.', '_')}", value)


def _fill_one(name: str, parameter: Tensor) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
