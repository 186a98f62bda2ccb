"""Settle ``mome.dispatch=auto`` for a run: measure, predict, say why."""

from __future__ import annotations

import torch
from deepspeed.utils import groups as deepspeed_groups
from rich.console import Console

from mome_dist.config import RunConfig
from mome_dist.config.derived import router_of, widths_of
from mome_dist.llm.shape import LLMShape
from mome_dist.model.shared import llm_dtype
from mome_dist.moe.dispatch.cost import LayerLoad, choose, measure
from mome_dist.parallel.layout import Layout
from mome_dist.planning.job import dispatches


def settle_dispatch(
    config: RunConfig, layout: Layout, shape: LLMShape, tokens: int, device: torch.device, console: Console
) -> str:
    """The dispatch that a run uses; every rank calls it and gets the same answer, of no effect without experts.

    Args:
        tokens: of one microbatch of one rank, padding included.
    """
    mome = config.mome
    if not mome.experts or mome.dispatch != "auto":
        return mome.dispatch
    possible = dispatches(layout, mome.experts, router_of(config), mome.expert)
    if len(possible) == 1:
        return possible[0]
    dtype, widths = llm_dtype(config), widths_of(config)
    load = LayerLoad(
        tokens=tokens,
        hidden_size=shape.hidden_size,
        experts=mome.routed_experts,
        shared=mome.shared_experts,
        top_k=mome.top_k,
        bottleneck=mome.bottleneck if widths is None else widths.widest,
        expert=mome.expert,
        capacity_factor=mome.capacity_factor,
        element_bytes=dtype.itemsize,
        # Forward and the gradient of the input; frozen weights have none.
        frozen_flops=4.0 * tokens * shape.layer_parameters / layout.tp,
    )
    group = deepspeed_groups._get_expert_parallel_group(f"ep_size_{layout.ep}")
    choice = choose(load, measure(load, group, dtype, device), layout.ep)
    for reason in choice.reasons:
        console.print(f"  {reason}", highlight=False)
    console.print(f"mome.dispatch=auto: {choice.name}", highlight=False)
    return choice.name
