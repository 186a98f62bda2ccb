"""How many tokens a rank's microbatch may have: what is left of its memory, by what a token needs.

The memory model (`mome_dist.planning.memory`) is nearly linear in the utterances of a microbatch, so that two of its
values tell the rest. What it cannot know is kept back in the share of the memory that a plan may use at all.
"""

from __future__ import annotations

from dataclasses import replace

from mome_dist.config.deepspeed.keys import BUCKET_ELEMENTS
from mome_dist.parallel.layout import Layout
from mome_dist.planning.hardware import CPU_KERNEL_BYTES, CPU_PROCESS_BYTES, GPU_RUNTIME_BYTES, USABLE_SHARE
from mome_dist.planning.job import Candidate, Job
from mome_dist.planning.memory import memory


def microbatch_budget(job: Job, layout: Layout, zero: int, dispatch: str, rank_bytes: float, on_gpu: bool) -> int:
    """Tokens that fit, in utterances as long as the job's: at least those of one of them.

    Args:
        dispatch: "alltoall", "gather" or "local".
        rank_bytes: memory of a GPU, or a rank's share of a node's.
    """
    runtime = GPU_RUNTIME_BYTES if on_gpu else CPU_PROCESS_BYTES + CPU_KERNEL_BYTES
    bucket = 4.0 * BUCKET_ELEMENTS if on_gpu and zero else 0.0
    candidate = Candidate(layout, zero, dispatch, accumulation=layout.pp)
    fitting = []
    for stage in {0, layout.pp - 1}:  # the first keeps most activations, the last one has the logits
        one, two = (
            memory(replace(job, batch_size=each * layout.dp * layout.pp), candidate, stage, runtime, bucket).total
            for each in (1, 2)
        )
        fitting.append(1 + (rank_bytes * USABLE_SHARE - one) / (two - one))
    of_one = sum(count for _, count in candidate.longest_pass(replace(job, batch_size=layout.dp * layout.pp)))
    return int(max(min(fitting), 1.0) * of_one)
