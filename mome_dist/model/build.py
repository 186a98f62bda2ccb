"""The distributed model of a configuration: this rank's chunks, on the process groups of its layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.tensor_parallel import TensorParallelLoRA, TermsOfTokens
from mome_dist.config.derived import llm_terms_of
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
from mome_dist.moe.low_rank import LowRankExperts
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
        UserError: for missing or wrong files of the LLM.
    """
    shape = LLMShape.from_directory(config.llm.path)
    chunks = []
    for number in range(layout.virtual):
        llm = build_frozen_llm(shape, llm_dtype(config), config.llm.attention, device, layout, number)
        load_weights(llm, shape, config.llm.path, slice_cache)
        spread = _attach_experts(config, llm, layout, dispatch) if config.mome.spread else {}
        inside = _attach_low_rank(config, llm, shape) if config.mome.inside else {}
        projectors = build_projectors(config, widths).to(device) if llm.pre_process else None
        others: dict[str, nn.Module] = {f"mome.{number}": experts for number, experts in inside.items()}
        others |= _attach_unrouted(config, llm) | _attach_llm_lora(config, llm, shape)
        if tokens := filled_tokens(config):
            llm.capture_layers(graphs_of(config.llm.graphs, device), tokens)
        chunks.append(Chunk(llm, projectors, spread | inside, others, config.llm.sink_loss, config.task.cross_rate))
    return DistributedMoME(chunks, layout.ep if config.mome.spread else None, lora)


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
        reroute_candidates=config.mome.reroute_candidates,
        alltoall_nodes=config.mome.alltoall_nodes,
        balance_loss=config.mome.balance_loss,
        z_loss=config.mome.z_loss,
        keep_probs=config.task.cross_rate.route_kl > 0,
        **mome_arguments(config),
    )


def _attach_low_rank(config: RunConfig, llm: FrozenLLM, shape: LLMShape) -> dict[int, LowRankExperts]:
    """The experts in the attention of a chunk's layers by global layer number."""
    found: dict[int, LowRankExperts] = {}
    for layer in llm.decoder.layers:
        number = layer.layer_number - 1
        experts = LowRankExperts(
            number,
            *_widths(shape),
            **mome_arguments(config),
            ranks=llm.config.tensor_model_parallel_size,
            sequence_parallel=llm.config.sequence_parallel,
            balance_loss=config.mome.balance_loss,
            z_loss=config.mome.z_loss,
        )
        experts.initialize(f"mome.{number}", config.seed)
        layer.self_attention.experts = found[number] = experts.to(next(llm.parameters()).device)
    return found


def _widths(shape: LLMShape) -> tuple[int, int, int]:
    """The widths of hidden states, of queries, and of values."""
    return shape.hidden_size, shape.heads * shape.head_size, shape.kv_heads * shape.head_size


def _attach_unrouted(config: RunConfig, llm: FrozenLLM) -> dict[str, nn.Module]:
    """The experts of a chunk's layers in a run without a router, by layout-free prefix."""
    mome, found = config.mome, dict[str, nn.Module]()
    for layer in llm.decoder.layers if mome.placed and not mome.experts else ():
        number, hidden_size = layer.layer_number - 1, llm.config.hidden_size
        beside = UnroutedExperts(number, hidden_size, mome.shared_experts, mome.bottleneck, mome.expert)
        beside.shared.initialize(f"mome.{number}.shared", config.seed)
        layer.slot(mome.placement).mome = found[f"mome.{number}"] = beside.to(next(llm.parameters()).device)
    return found


def _attach_llm_lora(config: RunConfig, llm: FrozenLLM, shape: LLMShape) -> dict[str, nn.Module]:
    """The low-rank terms of a chunk's layers by layout-free prefix; none where the LLM has none."""
    terms, found = llm_terms_of(config, shape.hidden_size), dict[str, nn.Module]()
    if terms is None:
        return found
    of_tokens, sizes = TermsOfTokens(terms), llm.config
    for layer in llm.decoder.layers:
        number = layer.layer_number - 1
        adapter = TensorParallelLoRA(
            terms, number, *_widths(shape), sizes.tensor_model_parallel_size, sizes.sequence_parallel, of_tokens
        )
        adapter.initialize(f"{PREFIX}.{number}", config.seed)
        layer.self_attention.lora = found[f"{PREFIX}.{number}"] = adapter.to(next(llm.parameters()).device)
    return found
