"""Start the process groups of a layout: torch.distributed, Megatron-Core, DeepSpeed, in that order.

`mome_dist.parallel.backend` says over what they go. Every collective has the configured timeout, and a lost rank ends
the run on all others with an error that names it instead of a hang.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mome_dist.parallel import cpu_shim, rendezvous
from mome_dist.parallel.backend import GLOO
from mome_dist.parallel.device import own_place
from mome_dist.parallel.layout import Coordinates, Layout
from mome_dist.parallel.memory import keep_freed_memory
from mome_dist.parallel.mpu import MegatronMPU
from mome_dist.parallel.staging import messages_over_the_host
from mome_dist.parallel.whereabouts import watched


@contextmanager
def parallel_world(layout: Layout, seed: int, timeout_seconds: int) -> Iterator[Coordinates]:
    """Open the process groups of ``layout`` in this process and close them at the end.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them; alone, it opens a world of one.

    Yields:
        The coordinates of this rank.

    Raises:
        RankLostError: if another rank does not come, dies, hangs or is too slow.
        UserError: if NCCL has no GPU for this rank.
    """
    cpu_shim.install()
    device, backend = own_place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    staged = messages_over_the_host() if backend == GLOO and device.type == "cuda" else nullcontext()
    rendezvous.join(backend, timeout_seconds)
    with staged, rendezvous.timeout_of_every_group(timeout_seconds), watched(timeout_seconds, _close):
        assert dist.get_world_size() == layout.world_size, "the layout was made for another number of processes"
        _start_deepspeed(backend, timedelta(seconds=timeout_seconds))
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            expert_model_parallel_size=1,  # expert parallelism belongs to DeepSpeed
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
        model_parallel_cuda_manual_seed(seed)
        # The expert groups of this layout, made now and for all layers; MoE modules find them by name.
        deepspeed_groups.mpu = MegatronMPU()
        deepspeed_groups._create_expert_data_and_model_parallel(layout.ep, deepspeed_groups.mpu)
        yield layout.coordinates(dist.get_rank())


def _start_deepspeed(backend: str, timeout: timedelta) -> None:
    deepspeed_logger.setLevel(logging.ERROR)
    # DeepSpeed reads the rank from the environment even where torch.distributed is initialised already.
    os.environ.setdefault("LOCAL_RANK", "0")
    if backend == GLOO:
        # Otherwise a C++ extension for shared memory is compiled at the first start, for most of a minute, and every
        # start asks the compiler for all others. No operation of DeepSpeed's own is used here.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _close() -> None:
    parallel_state.destroy_model_parallel()
    for registry in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        registry.clear()
    deepspeed_groups.mpu = None
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # a later world in the same process starts from nothing
