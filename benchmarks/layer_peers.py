"""What the MoME layer is measured against that computes something else: Megatron-Core's layer, and two products."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layer_candidates import BALANCE_LOSS, LayerShape

# Megatron-Core 0.16 asks whether this is None without having set it where there is no Transformer Engine.
vars(moe_utils).setdefault("te_general_gemm", None)


class MegatronLayer(nn.Module):
    """Megatron-Core's `MoELayer` with a shared expert, weights in the precision of the hidden states, fp32 router.

    Its experts run one after the other, as they do without Transformer Engine, whose grouped products are Megatron's
    faster form. They have no biases, which its shared expert does not know.

    Args:
        dispatcher: "alltoall", which training usually takes, or "allgather". The former wants CUDA streams.
    """

    def __init__(self, shape: LayerShape, dtype: torch.dtype, dispatcher: str) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=shape.hidden_size,
            num_attention_heads=1,
            ffn_hidden_size=shape.bottleneck,
            num_moe_experts=shape.experts,
            moe_ffn_hidden_size=shape.bottleneck,
            moe_shared_expert_intermediate_size=shape.bottleneck,
            moe_router_topk=shape.top_k,
            moe_router_dtype="fp32",
            moe_aux_loss_coeff=BALANCE_LOSS,
            moe_token_dispatcher_type=dispatcher,
            activation_func=F.gelu,
            add_bias_linear=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_cpu_initialization=True,
        )
        products = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(SequentialMLP, params={"submodules": products})
        shared = ModuleSpec(SharedExpertMLP, params={"submodules": products})
        self.moe = MoELayer(config, MoESubmodules(experts=experts, shared_experts=shared), layer_number=1)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, None]:
        """[T, H] -> [T, H]; its balance loss joins the backward pass by itself."""
        return self.moe(hidden_TH[:, None])[0][:, 0], None


class Products(nn.Module):
    """Two dense products, [T, H] x [H, U] and back: what is left of a layer of U units without router and gates."""

    def __init__(self, hidden_size: int, units: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, units, bias=False, dtype=dtype)
        self.up = nn.Linear(units, hidden_size, bias=False, dtype=dtype)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, None]:
        """[T, H] -> [T, H]."""
        return self.up(self.down(hidden_TH)), None
