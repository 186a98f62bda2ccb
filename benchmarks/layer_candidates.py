"""The layers under comparison, all computing the same function from the same weights.

`StockLayer` is DeepSpeed's MoE layer as it comes: its generic top-K gating, which for K = 4 drops nothing when asked,
its loop over experts and its dispatch. Its experts cast their fp32 parameters to the precision of the hidden states,
which plain `nn.Linear` experts refuse; and MoME's shared expert is added to it.

`TransformersLayer` is what transformers' own models compute their experts with, by each of its implementations.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

from benchmarks.layer_options import STOCK
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.moe.routers.spec import PLAIN, RouterSpec
from mome_dist.token_context import TokenContext

BALANCE_LOSS = 0.01
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")  # its implementations of experts that need no other package
MOST_COPIED = 1e9  # bytes; `batched_mm` copies the weights of a token's experts for every token


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


@use_experts_implementation(has_gate=False, has_bias=True)
class TransformersExperts(nn.Module):
    """Experts as transformers' models hold them, one tensor of a part for all, in the precision of the hidden states.

    Args:
        config: says which implementation computes them; "eager" is `forward`, a loop over experts as its models have.
    """

    def __init__(self, config: Any, shape: LayerShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, experts, hidden, units = shape.experts, shape.experts, shape.hidden_size, shape.bottleneck
        self.up_proj = nn.Parameter(torch.empty(experts, units, hidden, dtype=dtype))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, units, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, units, dtype=dtype))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden, dtype=dtype))
        self.act_fn = nn.GELU()

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        output_TH = torch.zeros_like(hidden_TH)
        for expert in experts_TK.unique().tolist():
            tokens, places = torch.where(experts_TK == expert)
            narrow = self.act_fn(F.linear(hidden_TH[tokens], self.up_proj[expert], self.up_proj_bias[expert]))
            wide = F.linear(narrow, self.down_proj[expert], self.down_proj_bias[expert])
            output_TH.index_add_(0, tokens, (wide * gates_TK[tokens, places, None]).to(wide.dtype))
        return output_TH


class TransformersLayer(nn.Module):
    """Those experts with an fp32 router and a shared expert. It has no balance loss: its models add one at their end.

    Args:
        implementation: one of `TRANSFORMERS`.
    """

    def __init__(self, shape: LayerShape, dtype: torch.dtype, implementation: str) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Linear(shape.hidden_size, shape.experts, bias=False)
        config = SimpleNamespace(_experts_implementation=implementation)
        self.experts = TransformersExperts(config, shape, dtype)
        self.shared = Bottleneck(shape.hidden_size, shape.bottleneck)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, None]:
        """[T, H] -> [T, H]."""
        chosen = self.router(hidden_TH.float()).softmax(dim=-1).topk(self.top_k, dim=-1)
        gates_TK = chosen.values / chosen.values.sum(dim=-1, keepdim=True)
        return self.experts(hidden_TH, chosen.indices, gates_TK) + self.shared(hidden_TH), None


class MoMELayer(nn.Module):
    """Our layer with one of its dispatches.

    Args:
        router: of the layer.
        tokens: of every pass; None for text of any length.
        others: further arguments of `ExpertParallelMoME`.

    Attributes:
        load: of the latest pass.
    """

    load: PassLoad

    def __init__(
        self,
        shape: LayerShape,
        ep: int,
        dispatch: str,
        router: RouterSpec = PLAIN,
        tokens: TokenContext | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self._tokens = tokens
        self.mome = ExpertParallelMoME(
            shape.hidden_size,
            shape.experts,
            shape.top_k,
            shared_experts=1,
            bottleneck=shape.bottleneck,
            router=router,
            ep_size=ep,
            dispatch=dispatch,
            balance_loss=BALANCE_LOSS,
            **others,
        )
        self.mome.set_deepspeed_parallelism()
        self.mome.set_token_group(parallel_state.get_data_parallel_group())

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, None]:
        """[T, H] -> [T, H], whose backward pass adds the gradients of the weighted balance loss."""
        context = self._tokens or TokenContext.of([("text", [len(hidden_TH)])], multiple=1)
        self.load = PassLoad(context.view_names, self.mome.deepspeed_moe.token_group)
        self.mome.prefetch(hidden_TH.dtype)
        output_TH = self.mome(hidden_TH, context, self.load)
        self.load.reduce()
        return output_TH, None


Layer = StockLayer | TransformersLayer | MoMELayer


def build_layers(shape: LayerShape, ep: int, ep_rank: int) -> dict[str, StockLayer | MoMELayer]:
    """DeepSpeed's layer, then ours with each dispatch, by name and with equal weights."""
    layers: dict[str, StockLayer | MoMELayer] = {STOCK: StockLayer(shape, ep)}
    for dispatch in ("alltoall", "gather" if ep > 1 else "local"):
        layers[dispatch] = MoMELayer(shape, ep, dispatch)
    for layer in layers.values():
        _fill(layer, ep_rank)
    return layers


def transformers_layers(
    shape: LayerShape, dtype: torch.dtype, tokens: int
) -> dict[str, Callable[[], TransformersLayer]]:
    """What builds each of transformers' layers, with the weights of `build_layers`, for so many tokens of a dtype."""

    def build(implementation: str) -> TransformersLayer:
        layer = TransformersLayer(shape, dtype, implementation)
        _fill(layer, 0)
        return layer

    copied = tokens * shape.top_k * shape.bottleneck * shape.hidden_size * dtype.itemsize
    return {
        f"transformers {implementation}": partial(build, implementation)
        for implementation in TRANSFORMERS
        if implementation != "batched_mm" or copied <= MOST_COPIED
    }


def first_expert_gradient(layer: Layer) -> Tensor:
    """The gradient of the down-projection of the first expert that this rank holds: [b, H]."""
    if isinstance(layer, TransformersLayer):
        gradient_EbH = layer.experts.up_proj.grad
        assert gradient_EbH is not None
        return gradient_EbH[0]
    if isinstance(layer, StockLayer):
        return layer.routed.deepspeed_moe.experts.deepspeed_experts[0].down.weight.grad
    experts = layer.mome.deepspeed_moe.experts
    bottleneck, hidden_size = experts.shapes[0]
    return experts.packed.grad[0, : bottleneck * hidden_size].view(bottleneck, hidden_size)


@torch.no_grad()
def _fill(layer: Layer, ep_rank: int) -> None:
    """Give every parameter a value that depends on its global name only."""
    if isinstance(layer, TransformersLayer):
        _fill_one("router", layer.router.weight)
        parts = {"up_proj": "down.weight", "up_proj_bias": "down.bias"}
        parts |= {"down_proj": "up.weight", "down_proj_bias": "up.bias"}
        for name, part in parts.items():
            for expert, value in enumerate(getattr(layer.experts, name)):
                _fill_one(f"expert.{expert}.{part}", value)
    else:
        module = layer.routed if isinstance(layer, StockLayer) else layer.mome
        _fill_one("router", module.deepspeed_moe.gate.wg.weight)
        # Both have DeepSpeed's names, whatever holds the numbers.
        experts, first = module.deepspeed_moe.experts, ep_rank * module.num_local_experts
        for name, value in experts.state_dict().items():
            _, number, part = name.split(".", 2)
            _fill_one(f"expert.{first + int(number)}.{part}", value)
    shared = layer.mome.shared if isinstance(layer, MoMELayer) else layer.shared
    assert shared is not None
    for name, parameter in shared.named_parameters():
        # Ours is a stack of one with names like down_weight.
        value = parameter[0] if isinstance(layer, MoMELayer) else parameter
        _fill_one(f"shared.{name.replace('.', '_')}", value)


def _fill_one(name: str, parameter: Tensor) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
