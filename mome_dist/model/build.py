"""The distributed model of a configuration: this rank's chunks, on the process groups of its layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.config.derived import check_reads, llm_terms_of, reads_previous
from mome_dist.config.graphs import filled_tokens
from mome_dist.config.schema import RunConfig
from mome_dist.cuda_graphs.kinds import graphs_of
from mome_dist.llm.megatron import FrozenLLM, build_frozen_llm
from mome_dist.llm.shape import LLMShape
from mome_dist.llm.slice_cache import SliceCache
from mome_dist.llm.weights import load_weights
from mome_dist.model.distributed import Chunk, DistributedMoME, attach_mome
from mome_dist.model.shared import build_projectors, llm_dtype, mome_arguments
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.unrouted import UnroutedExperts
from mome_dist.parallel.layout import Layout
from mome_dist.speech.lora import LoRATerms


def build_distributed(
    config: RunConfig,
    layout: Layout,
    widths: Mapping[str, int],
    dispatch: str,
    device: torch.device,
    slice_cache: SliceCache | None = None,
    lora: LoRATerms | None = None,
) -> DistributedMoME:
    """Build this rank's part with frozen weights loaded and trainables at their initial values.

    Args:
        widths: the encoders' feature widths by stream.
        dispatch: "alltoall", "gather" or "local": ``mome.dispatch`` with "auto" settled; of no effect without experts.
        slice_cache: of the LLM's weights; None reads the LLM's own files.
        lora: of the encoders that this rank has, on the first stage.

    Raises:
        UserError: for missing or wrong files of the LLM, or a layout that ``mome.reads`` does not go with.
    """
    check_reads(config, layout)
    shape = LLMShape.from_directory(config.llm.path)
    chunks = []
    for number in range(layout.virtual):
        llm = build_frozen_llm(shape, llm_dtype(config), config.llm.attention, device, layout, number)
        load_weights(llm, shape, config.llm.path, slice_cache)
        llm.reads_previous = reads_previous(config)
        momes = _attach_experts(config, llm, layout, dispatch) if config.mome.experts else {}
        projectors = build_projectors(config, widths).to(device) if llm.pre_process else None
        others = _attach_unrouted(config, llm) | _attach_llm_lora(config, llm, shape)
        if tokens := filled_tokens(config):
            llm.capture_layers(graphs_of(config.llm.graphs, device), tokens)
        chunks.append(Chunk(llm, projectors, momes, others, config.llm.sink_loss))
    return DistributedMoME(chunks, layout.ep if config.mome.experts else None, lora)


def _attach_experts(config: RunConfig, llm: FrozenLLM, layout: Layout, dispatch: str) -> dict[int, ExpertParallelMoME]:
    """The MoME modules of a chunk by global layer number."""
    return attach_mome(
        llm,
        config.mome.placement,
        config.seed,
        ep_size=layout.ep,
        dispatch=dispatch,
        capacity_factor=config.mome.capacity_factor,
        eval_capacity_factor=config.mome.eval_capacity_factor,
        min_capacity=config.mome.min_capacity,
        drop_policy=config.mome.drop_policy,
        balance_loss=config.mome.balance_loss,
        z_loss=config.mome.z_loss,
        **mome_arguments(config),
    )


def _attach_unrouted(config: RunConfig, llm: FrozenLLM) -> dict[str, nn.Module]:
    """The experts of a chunk's layers in a run without a router, by layout-free prefix."""
    mome, found = config.mome, dict[str, nn.Module]()
    for layer in llm.decoder.layers if mome.placed and not mome.experts else ():
        number, hidden_size = layer.layer_number - 1, llm.config.hidden_size
        beside = UnroutedExperts(number, hidden_size, mome.shared_experts, mome.bottleneck, mome.expert)
        beside.initialize(f"mome.{number}", config.seed)
        layer.slot(mome.placement).mome = found[f"mome.{number}"] = beside.to(next(llm.parameters()).device)
    return found


def _attach_llm_lora(config: RunConfig, llm: FrozenLLM, shape: LLMShape) -> dict[str, nn.Module]:
    """The low-rank terms of a chunk's layers by layout-free prefix; none where the LLM has none."""
    terms, found = llm_terms_of(config, shape.hidden_size), dict[str, nn.Module]()
    if terms is None:
        return found
    of_tokens, sizes = TermsOfTokens(terms), llm.config
    widths = (shape.hidden_size, shape.heads * shape.head_size, shape.kv_heads * shape.head_size)
    for layer in llm.decoder.layers:
        number = layer.layer_number - 1
        adapter = TensorParallelLoRA(
            terms, number, *widths, sizes.tensor_model_parallel_size, sizes.sequence_parallel, of_tokens
        )
        adapter.initialize(f"{PREFIX}.{number}", config.seed)
        layer.self_attention.lora = found[f"{PREFIX}.{number}"] = adapter.to(next(llm.parameters()).device)
    return found
