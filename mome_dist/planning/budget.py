"""How many tokens a rank's microbatch may have: as many as the memory model (`mome_dist.planning.memory`) has room for.

What the model cannot know is kept back in the share of the memory that a plan may use at all.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from mome_dist.parallel.layout import Layout
from mome_dist.planning.hardware import USABLE_SHARE, runtime_bytes
from mome_dist.planning.job import Candidate, Job
from mome_dist.planning.memory import memory

MOST = 1 << 14  # utterances of a microbatch that are thought of


def microbatch_budget(job: Job, layout: Layout, zero: int, dispatch: str, rank_bytes: float, on_gpu: bool) -> int:
    """Tokens that fit, in utterances as long as the job's: at least those of one of them.

    Args:
        dispatch: "alltoall", "gather" or "local".
        rank_bytes: memory of a GPU, or a rank's share of a node's.
    """
    candidate = Candidate(layout, zero, dispatch, accumulation=layout.pp)

    def with_utterances(count: int) -> Job:
        return replace(job, batch_size=count * layout.dp * layout.pp)

    def need(count: int) -> float:
        # The first stage keeps most activations, the last one has the logits.
        stages, runtime = {0, layout.pp - 1}, runtime_bytes(on_gpu)
        return max(memory(with_utterances(count), candidate, stage, runtime, on_gpu).total for stage in stages)

    fitting = max(bisect_right(range(1, MOST), rank_bytes * USABLE_SHARE, key=need), 1)
    return sum(tokens for _, tokens in candidate.longest_pass(with_utterances(fitting)))
