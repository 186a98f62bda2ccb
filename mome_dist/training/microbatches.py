"""Settle how many microbatches a run's steps have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from rich.console import Console

from mome_dist.cluster.facts import describe_rank
from mome_dist.config import RunConfig
from mome_dist.config.deepspeed.file import deepspeed_of
from mome_dist.config.derived import least_parts
from mome_dist.data.corpus import Utterance
from mome_dist.data.media import FPS
from mome_dist.data.parts import Parts
from mome_dist.engine.optimizer import zero_stage
from mome_dist.llm.shape import LLMShape
from mome_dist.parallel.layout import Layout
from mome_dist.planning.budget import microbatch_budget
from mome_dist.planning.job import Clip, dispatches, job_of


def settle_parts(
    config: RunConfig,
    layout: Layout,
    shape: LLMShape,
    widths: Mapping[str, int],
    utterances: Sequence[Utterance],
    device: torch.device,
    console: Console,
) -> Parts:
    """How global batches are cut; every rank calls it and gets the same answer.

    With ``data.accumulation=auto`` and no ``data.microbatch_tokens``, the plan of the rank with the least memory says
    how many tokens fit.

    Args:
        widths: the encoders' feature widths by stream.
        utterances: of the training split; the longest one counts.
    """
    least, multiple = least_parts(config, layout), layout.pp if layout.virtual > 1 else 1
    if config.data.accumulation != "auto":
        return Parts(least, None, multiple)
    budget = config.data.microbatch_tokens
    if budget is None:
        seconds = max(utterance.length for utterance in utterances) / FPS
        on_gpu = device.type == "cuda"
        job = job_of(config, shape, Clip(seconds), widths, on_gpu, fast_precision="fp32")
        zero = zero_stage(deepspeed_of(config, layout.dp).acts)
        ranks = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = describe_rank(device)["memory_bytes"] / ranks
        auto = config.mome.dispatch == "auto"
        possible = dispatches(layout, job.spread, job.router, job.expert) if auto else [config.mome.dispatch]
        budgets = [microbatch_budget(job, layout, zero, dispatch, memory, on_gpu) for dispatch in possible]
        least_budget = torch.tensor(min(budgets), device=device)
        dist.all_reduce(least_budget, op=dist.ReduceOp.MIN)
        budget = int(least_budget)
    console.print(f"data.accumulation=auto: up to {budget:,} tokens in a microbatch of a rank", highlight=False)
    if layout.pp > 1:
        console.print(
            f"the {layout.pp} pipeline stages wait for each other less in more microbatches than memory asks for: set "
            f"data.accumulation to {2 * layout.pp} or more",
            highlight=False,
        )
    return Parts(least, budget, multiple)
