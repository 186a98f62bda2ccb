"""The frozen LLM as a Megatron-Core `GPTModel`, with a MoME module in every layer.

The layer classes below add ``mome(h)`` beside attention, the feed-forward network or the whole layer. They say where a
module goes; `mome_dist.parallel.model` decides which module and on which process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional as F

from mome_dist.llm.attention import attention_class
from mome_dist.llm.norm import RMSNorm
from mome_dist.llm.rope import inverse_frequencies
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.layout import Layout


class MoMESlot:
    """Mixin: a module whose first output gets ``mome(first input)`` added. Megatron's attention, feed-forward and layer
    modules all take the hidden states [S, B, H] first and return a pair that starts with their output."""

    mome: Any  # the MoME module, or None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("mome", None)  # type: ignore[attr-defined]
        self.valid_SB: Tensor | None = None
        self.auxiliary_scale = 1.0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output, rest = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.mome is None:
            return output, rest
        addition = self.mome(hidden_states, self.valid_SB)
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            # The auxiliary loss of this layer joins the backward pass here, whatever pipeline stage this is.
            addition = MoEAuxLossAutoScaler.apply(addition, self.mome.auxiliary_loss() * self.auxiliary_scale)
        return output + addition, rest


class MoMESelfAttention(MoMESlot, SelfAttention):
    """Self-attention with a slot beside it (placement "mhsa")."""


class MoMEMLP(MoMESlot, MLP):
    """Feed-forward network with a slot beside it (placement "ffn")."""


class MoMETransformerLayer(MoMESlot, TransformerLayer):
    """A layer with a slot beside it (placement "layer"), which also tells its sub-layers which tokens are padding."""

    def slot(self, placement: str) -> MoMESlot:
        """The part of this layer that the MoME module of a placement belongs to."""
        slots = {"mhsa": self.self_attention, "ffn": self.mlp, "layer": self}
        return slots[placement]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        padding_BS = kwargs.get("padding_mask")
        valid_SB = None if padding_BS is None else ~padding_BS.t()
        if valid_SB is not None and self.config.sequence_parallel:
            tp = parallel_state.get_tensor_model_parallel_world_size()
            valid_SB = valid_SB.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
        for part in (self, self.self_attention, self.mlp):
            part.valid_SB = valid_SB
            if part.mome is not None:
                part.mome.prefetch(hidden_states.dtype)
        return super().forward(hidden_states, *args, **kwargs)


class FrozenLLM(GPTModel):
    """A `GPTModel` that takes embeddings, and gives the summed token cross-entropy at label positions only.

    The output layer is by far the widest product of a small LLM; here it sees only positions that have a label.
    """

    def embed(self, ids_BS: Tensor) -> Tensor:
        """Token ids int64 [B, S] -> embeddings [S, B, H]; first pipeline stage only."""
        return self.embedding.word_embeddings(ids_BS).transpose(0, 1)

    def forward(
        self, embedded_SBH: Tensor | None, padding_BS: Tensor, label_index_N: Tensor, labels_N: Tensor
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            embedded_SBH: input of the first stage; None on later ones (the schedule sets their input).
            padding_BS: bool [B, S], True where there is no token.
            label_index_N: int64 [N], positions ``s * B + b`` whose output predicts a label.
            labels_N: int64 [N], the labels.

        Returns:
            Hidden states [S, B, H]; on the last stage the sum over labels of the cross-entropy, an fp32 scalar.
        """
        hidden_SBH = self._decode(embedded_SBH, padding_BS)
        if not self.post_process:
            return hidden_SBH
        hidden_SBH = self._whole_sequence(hidden_SBH)
        selected_N1H = hidden_SBH.flatten(0, 1).index_select(0, label_index_N)[:, None]
        logits_N1V, _ = self.output_layer(selected_N1H)
        return vocab_parallel_cross_entropy(logits_N1V.float(), labels_N[:, None]).sum()

    def logits(self, embedded_SBH: Tensor | None, padding_BS: Tensor) -> Tensor:
        """As `forward`, but the last stage returns fp32 logits [S, B, V / tp] of every position."""
        hidden_SBH = self._decode(embedded_SBH, padding_BS)
        if not self.post_process:
            return hidden_SBH
        return self.output_layer(self._whole_sequence(hidden_SBH))[0].float()

    def _whole_sequence(self, hidden_SBH: Tensor) -> Tensor:
        """Undo sequence parallelism. The output layer (see `build_frozen_llm`) gives its whole input gradient on every
        rank, so the backward pass only takes this rank's part of it."""
        if not self.config.sequence_parallel:
            return hidden_SBH
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)

    def _decode(self, embedded_SBH: Tensor | None, padding_BS: Tensor) -> Tensor:
        if embedded_SBH is not None and self.config.sequence_parallel:
            embedded_SBH = tensor_parallel.scatter_to_sequence_parallel_region(embedded_SBH)
        return self.decoder(
            hidden_states=embedded_SBH,
            attention_mask=None,
            rotary_pos_emb=self.rotary_pos_emb(padding_BS.shape[1]),
            padding_mask=padding_BS,
        )


def _layer_spec(attention: type[nn.Module]) -> ModuleSpec:
    return ModuleSpec(
        module=MoMETransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=MoMESelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MoMEMLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _pipeline_layout(stages: Sequence[int]) -> list[list[str]]:
    """Megatron-Core's spelling of the layers of each stage."""
    layout = [["decoder"] * layers for layers in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def transformer_config(shape: LLMShape, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's view of a Llama or Qwen2: no dropout, SwiGLU, RMSNorm, grouped key-value heads, and no bias but
    Qwen2's on queries, keys and values."""
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_model_parallel_layout=_pipeline_layout(layout.stages(shape.layers)) if layout.pp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        **_RECOMPUTE[layout.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        # Microbatches differ in length; Megatron exchanges shapes only if this dispatcher is named. The interleaved
        # schedule cannot: between two ranks it would mix up the shapes of the two directions.
        variable_seq_lengths=layout.virtual == 1,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_sync=False,
        batch_p2p_comm=layout.virtual == 1,
        overlap_p2p_comm=layout.virtual > 1,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build_frozen_llm(
    shape: LLMShape, dtype: torch.dtype, attention: str, device: torch.device, layout: Layout, chunk: int = 0
) -> FrozenLLM:
    """Build one of this rank's chunks of the LLM, on the process groups of ``layout``, with empty weights.

    Attention heads are padded where tensor parallelism does not divide them (`LLMShape.with_padded_heads`). The caller
    fills the weights (`mome_dist.llm.weights.load_weights`) and the MoME slots.
    """
    config = transformer_config(shape.with_padded_heads(layout.tp), layout, dtype)
    vp_stage = chunk if layout.virtual > 1 else None
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    layers = layout.stages(shape.layers)[chunk * layout.pp + pp_rank]
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(attention_class(attention, device))] * layers, layer_norm=RMSNorm
    )
    model = FrozenLLM(
        config,
        spec,
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        scatter_embedding_sequence_parallel=False,  # after speech tokens are in place, see FrozenLLM
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    # Megatron-Core's own frequencies know the scaling of Llama 3.1 only, with its constants built in.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape)
    if model.post_process and layout.sequence_parallel:
        # Label positions are selected from whole sequences, so its input is not split.
        model.output_layer.sequence_parallel, model.output_layer.allreduce_dgrad = False, True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return model.to(device)
