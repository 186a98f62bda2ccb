"""Balancing the experts after an optimiser step, without a loss: see `mome_dist.moe.balance.updated_bias`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mome_dist.parallel.model import DistributedMoME


def update_router_biases(model: DistributedMoME) -> None:
    """Move the router bias of every layer by its load in this step; every rank calls it once after each step.

    The loads already cover the global batch. Tensor-parallel ranks compute them each for itself, and a kernel that adds
    up in no fixed order might let them differ by a token; the first rank's loads are taken, so that the biases stay
    equal on all of them. Nothing is sent without a bias.
    """
    momes = [mome for mome in model.momes.values() if mome.step_load_E is not None]
    if momes and parallel_state.get_tensor_model_parallel_world_size() > 1:
        loads_LE = torch.stack([mome.step_load_E for mome in momes if mome.step_load_E is not None])
        dist.broadcast(
            loads_LE,
            src=parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        for mome, load_E in zip(momes, loads_LE, strict=True):
            mome.step_load_E = load_E
    for mome in momes:
        mome.update_bias()


def forget_router_loads(model: DistributedMoME) -> None:
    """Drop the loads of a step that is not taken."""
    for mome in model.momes.values():
        mome.step_load_E = None
