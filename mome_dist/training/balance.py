"""What routers do after an optimiser step, such as moving a bias (`mome_dist.moe.balance.updated_bias`)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mome_dist.model.distributed import DistributedMoME


def update_routers(model: DistributedMoME) -> None:
    """Tell the routers of all layers their load in this step; every rank calls it once after each step.

    The loads already cover the global batch. Tensor-parallel ranks compute them each for itself, and a kernel that adds
    up in no fixed order might let them differ by a token; the first rank's loads are taken, so that the routers stay
    equal on all of them. Nothing is sent where no router asks for its load.
    """
    for chunk in model.parts():
        load = chunk.statistics.step_load
        if load and any(mome.router.follows_load for mome in chunk.momes.values()):
            load_LE = torch.stack(list(load.values())).sum(dim=0)
            if parallel_state.get_tensor_model_parallel_world_size() > 1:
                source = parallel_state.get_tensor_model_parallel_src_rank()
                dist.broadcast(load_LE, src=source, group=parallel_state.get_tensor_model_parallel_group())
            for mome, load_E in zip(chunk.momes.values(), load_LE, strict=True):
                mome.router.after_step(load_E)
    forget_router_loads(model)


def forget_router_loads(model: DistributedMoME) -> None:
    """Drop the loads of a step that was taken, or is not."""
    for chunk in model.parts():
        chunk.statistics.step_load.clear()
