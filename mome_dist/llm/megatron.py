"""The frozen LLM as a Megatron-Core `GPTModel`, with a MoME module in every layer.

The layer classes below add ``mome(h)`` beside attention, the feed-forward network or the whole layer. They say where a
module goes; `mome_dist.model.distributed` decides which module and on which process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from mome_dist.cuda_graphs.replay import Graphs
from mome_dist.llm.attention import CausalAttention
from mome_dist.llm.graphed_stack import GraphedStack
from mome_dist.llm.norm import RMSNorm
from mome_dist.llm.rope import Rotation, inverse_frequencies
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.sinks import PrefixSinks
from mome_dist.llm.swiglu import swiglu
from mome_dist.moe.load import PassLoad, StackLoad
from mome_dist.parallel.layout import Layout
from mome_dist.token_context import FixedTokens, Labels, TokenContext


@dataclass(frozen=True)
class LayerContext:
    """What a layer gets beside hidden states.

    Attributes:
        tokens: of the whole pass.
        own: those that this rank holds between products: all, but under sequence parallelism.
        rotation: rotary positions.
        load: where routers count; None where nobody asks.
        sinks: of the sink loss; None without one.
        earlier: where a slot leaves what the one of the next layer reads; None where slots read what is theirs.
    """

    tokens: TokenContext | FixedTokens
    own: TokenContext | FixedTokens
    rotation: Rotation
    load: PassLoad | StackLoad | None
    sinks: PrefixSinks | None = None
    earlier: list[Tensor] | None = None


class MoMESlot:
    """Mixin: a place beside a module that a MoME module may fill; it reads what the module reads, or what that of the
    layer before read (`LayerContext.earlier`; ScMoE, arXiv 2404.05019)."""

    mome: Any  # the MoME module, or None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("mome", None)  # type: ignore[attr-defined]

    def begin(self, hidden_N1H: Tensor, context: LayerContext) -> Callable[[], Tensor] | None:
        """Start what fills the slot on ``hidden_N1H``, so that what it sends travels beside the module; None without.
        It gives what is to be added to the module's output."""
        if self.mome is None:
            return None
        return self.mome.begin(self._read(hidden_N1H, context), context.own, context.load)

    def beside(self, hidden_N1H: Tensor, output_N1H: Tensor, context: LayerContext) -> Tensor:
        """What the module gives for ``hidden_N1H``, and what fills the slot gives."""
        if self.mome is None:
            return output_N1H
        return output_N1H + self.mome(self._read(hidden_N1H, context), context.own, context.load)

    def _read(self, hidden_N1H: Tensor, context: LayerContext) -> Tensor:
        """What fills the slot reads; in the first layer that is its own in any case."""
        if context.earlier is None:
            return hidden_N1H
        read_N1H = context.earlier[0] if context.earlier else hidden_N1H
        context.earlier[:] = [hidden_N1H]
        return read_N1H


class MoMESelfAttention(MoMESlot, SelfAttention):
    """Self-attention with a slot beside it (placement "mhsa"), and one in it: what adds to queries and values before
    their rotation."""

    lora: Any  # `mome_dist.adapters.tensor_parallel.TensorParallelLoRA`, or None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("lora", None)

    def forward(self, hidden_N1H: Tensor, context: LayerContext) -> Tensor:
        """[N, 1, H] -> [N, 1, H]; under sequence parallelism a rank's tokens, both times."""
        begun = self.begin(hidden_N1H, context)
        qkv_N1Z, _ = self.linear_qkv(hidden_N1H)
        groups, head = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        if self.lora is not None:
            qkv_N1Z = self.lora(hidden_N1H, qkv_N1Z, groups, context.own)
        qkv_NGXd = context.rotation(qkv_N1Z.view(qkv_N1Z.shape[0], groups, -1, head))
        if self.checkpoint_core_attention and torch.is_grad_enabled():
            attend = partial(self.core_attention, context=context.tokens)
            attended_NZ = tensor_parallel.checkpoint(attend, False, qkv_NGXd)
        else:
            attended_NZ = self.core_attention(qkv_NGXd, context.tokens)
        output_N1H, _ = self.linear_proj(attended_NZ[:, None])
        return output_N1H if begun is None else output_N1H + begun()


class MoMEMLP(MoMESlot, MLP):
    """Feed-forward network with a slot beside it (placement "ffn")."""

    def forward(self, hidden_N1H: Tensor, context: LayerContext) -> Tensor:
        """[N, 1, H] -> [N, 1, H]; under sequence parallelism a rank's tokens, both times."""
        begun = self.begin(hidden_N1H, context)
        gate_up, _ = self.linear_fc1(hidden_N1H)
        output_N1H, _ = self.linear_fc2(swiglu(gate_up))
        return output_N1H if begun is None else output_N1H + begun()


class MoMETransformerLayer(MoMESlot, TransformerLayer):
    """A layer with a slot beside it (placement "layer")."""

    def slot(self, placement: str) -> MoMESlot:
        """The part of this layer that the MoME module of a placement belongs to."""
        slots = {"mhsa": self.self_attention, "ffn": self.mlp, "layer": self}
        return slots[placement]

    def forward(
        self, hidden_states: Tensor, *_unused: Any, packed_seq_params: LayerContext, **_also: Any
    ) -> tuple[Tensor, None]:
        """[N, 1, H] -> the same, and None for Megatron-Core's cross-attention.

        Args:
            packed_seq_params: the name under which Megatron-Core's block hands its layers a context.
        """
        context = packed_seq_params
        for part in (self, self.self_attention, self.mlp):
            if part.mome is not None:
                part.mome.prefetch(hidden_states.dtype)
        attended = hidden_states + self.self_attention(self.input_layernorm(hidden_states), context)
        output = attended + self.mlp(self.pre_mlp_layernorm(attended), context)
        output = self.beside(hidden_states, output, context)
        if context.sinks is not None and self.layer_number < self.config.num_layers:
            output = context.sinks(output)
        return output, None


class FrozenLLM(GPTModel):
    """A `GPTModel` that takes embeddings of packed tokens, and gives the token cross-entropy at label positions only.

    The output layer is by far the widest product of a small LLM; here it sees only positions that have a label.

    Attributes:
        graphed: the layers in graphs, for passes of training that it takes; None without any.
        reads_previous: whether what is beside the layers reads what that of the layer before would.
    """

    graphed: GraphedStack | None = None
    reads_previous = False

    def capture_layers(self, graphs: Graphs, tokens: int) -> None:
        """Run passes of training of so many tokens as graphs from now on; once everything that trains in the layers is
        there. The layers are whole on this rank, and nothing is computed again for the backward pass."""

        def layers(hidden_N1H: Tensor, context: FixedTokens, load: StackLoad) -> Tensor:
            return self._run_layers(hidden_N1H, context, context, load)

        self.graphed = GraphedStack(layers, list(self.decoder.parameters()), graphs, tokens)

    def embed(self, ids_N: Tensor) -> Tensor:
        """Token ids int64 [N] -> embeddings [N, H]; first pipeline stage only."""
        return self.embedding.word_embeddings(ids_N[None])[0]

    def forward(
        self,
        embedded_NH: Tensor | None,
        context: TokenContext,
        load: PassLoad | None,
        labels: Labels,
        sink_weight: float = 0.0,
        sink_terms: list[Tensor] | None = None,
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            embedded_NH: input of the first stage; None on later ones (the schedule sets their input).
            load: where the stage's routers count; None where nobody asks.
            labels: what is to be predicted.
            sink_weight: of the sink loss of one sequence (`mome_dist.llm.sinks`), summed over layers.
            sink_terms: gets the sink loss of the pass in its backward pass, in parts: fp32 scalars.

        Returns:
            Hidden states [N, 1, H] (of this rank's tokens under sequence parallelism); on the last stage the sum of the
            cross-entropy over the labels of each view, fp32 [V].
        """
        sinks = None if sink_terms is None else self._sinks(context, sink_weight, sink_terms)
        hidden_N1H = self._decode(embedded_NH, context, load, sinks)
        if not self.post_process:
            return hidden_N1H
        selected_L1H = self._whole(hidden_N1H).index_select(0, labels.index_L)
        logits_L1V, _ = self.output_layer(selected_L1H)
        losses_L1 = vocab_parallel_cross_entropy(logits_L1V.float(), labels.ids_L[:, None])
        return context.members_VN.index_select(1, labels.index_L) @ losses_L1[:, 0]

    def logits(self, embedded_NH: Tensor | None, context: TokenContext) -> Tensor:
        """As `forward`, but the last stage returns fp32 logits [N, vocabulary / tp] of every position."""
        hidden_N1H = self._decode(embedded_NH, context, None)
        if not self.post_process:
            return hidden_N1H
        return self.output_layer(self._whole(hidden_N1H))[0][:, 0].float()

    def _whole(self, hidden_N1H: Tensor) -> Tensor:
        """Undo sequence parallelism. The output layer (see `build_frozen_llm`) gives its whole input gradient on every
        rank, so the backward pass only takes this rank's part of it."""
        if not self.config.sequence_parallel:
            return hidden_N1H
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_N1H, tensor_parallel_output_grad=False)

    def _decode(
        self, embedded_NH: Tensor | None, context: TokenContext, load: PassLoad | None, sinks: PrefixSinks | None = None
    ) -> Tensor:
        embedded_N1H = None if embedded_NH is None else embedded_NH[:, None]
        own = context
        if self.config.sequence_parallel:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            own = context.part(parallel_state.get_tensor_model_parallel_rank(), ranks)
            if embedded_N1H is not None:
                embedded_N1H = tensor_parallel.scatter_to_sequence_parallel_region(embedded_N1H)
        graphed = self.graphed if torch.is_grad_enabled() else None
        if graphed is not None and embedded_N1H is not None and load is not None and graphed.takes(context):
            return graphed(embedded_N1H, context, load)
        return self._run_layers(embedded_N1H, context, own, load, sinks)

    def _run_layers(
        self,
        hidden_N1H: Tensor | None,
        context: TokenContext | FixedTokens,
        own: TokenContext | FixedTokens,
        load: PassLoad | StackLoad | None,
        sinks: PrefixSinks | None = None,
    ) -> Tensor:
        """This stage's layers; what the arguments are is said in `LayerContext`."""
        queries = self.config.num_attention_heads // self.config.num_query_groups
        frequencies, dtype = self.rotary_pos_emb.inv_freq, self.config.params_dtype
        earlier: list[Tensor] | None = [] if self.reads_previous else None
        rotation = Rotation.of(context.positions_N, frequencies, queries, dtype)
        return self.decoder(
            hidden_states=hidden_N1H,
            attention_mask=None,
            packed_seq_params=LayerContext(context, own, rotation, load, sinks, earlier),
        )

    def _sinks(self, context: TokenContext, weight: float, terms: list[Tensor]) -> PrefixSinks | None:
        """The sink loss of a pass, on the tokens that this rank holds between layers; None without a weight."""
        if not weight:
            return None
        weight /= self.config.num_layers - 1
        if not self.config.sequence_parallel:
            return PrefixSinks.of(context, weight, terms)
        rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
        return PrefixSinks.of(context, weight, terms, rank, group)


def _layer_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MoMETransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=MoMESelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=IdentityOp,  # `build_frozen_llm` puts it in
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
    spec = TransformerBlockSubmodules(layer_specs=[_layer_spec()] * layers, layer_norm=RMSNorm)
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
    for layer in model.decoder.layers:
        layer.self_attention.core_attention = CausalAttention(attention, shape.head_size)
    # Megatron-Core's own frequencies know the scaling of Llama 3.1 only, with its constants built in.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(device)
    if model.post_process and layout.sequence_parallel:
        # Label positions are selected from whole sequences, so its input is not split.
        model.output_layer.sequence_parallel, model.output_layer.allreduce_dgrad = False, True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return model.to(device)
