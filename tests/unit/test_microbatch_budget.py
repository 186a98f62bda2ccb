"""Tokens of a microbatch that fit a rank's memory, held to the memory model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mome_dist.config import load_config
from mome_dist.parallel.layout import Layout
from mome_dist.planning.budget import microbatch_budget
from mome_dist.planning.hardware import GPU_RUNTIME_BYTES, USABLE_SHARE
from mome_dist.planning.job import Candidate, Clip, Job, job_of
from mome_dist.planning.llms import LLMS
from mome_dist.planning.memory import memory

WIDTHS = {"audio": 1024, "video": 1024}


def _job(seconds: float) -> Job:
    config = load_config(["experiment=lrs3", "parallel=single"])
    return job_of(config, LLMS["llama-3.2-3b"], Clip(seconds), WIDTHS, on_gpu=True)


def _fullest(job: Job, layout: Layout, utterances: int) -> float:
    """Bytes of the fullest rank when a microbatch has so many utterances."""
    job = replace(job, batch_size=utterances * layout.dp * layout.pp)
    candidate = Candidate(layout, 1, "local", layout.pp)
    return max(memory(job, candidate, stage, GPU_RUNTIME_BYTES, reserves=True).total for stage in range(layout.pp))


@pytest.mark.parametrize("layout", [Layout.for_world(1), Layout.for_world(4, pp=2), Layout.for_world(2, tp=2)])
@pytest.mark.parametrize("gigabytes", [40, 80, 141])
def test_what_fits_fits_and_one_utterance_more_does_not(layout: Layout, gigabytes: int) -> None:
    job, usable = _job(6.0), gigabytes * 1e9 * USABLE_SHARE
    budget = microbatch_budget(job, layout, 1, "local", gigabytes * 1e9, on_gpu=True)
    fitting, rest = divmod(budget, sum(job.lengths))
    assert rest == 0
    assert _fullest(job, layout, fitting) <= usable < _fullest(job, layout, fitting + 1)


def test_one_utterance_is_tried_however_small_the_memory() -> None:
    job = _job(16.0)
    assert microbatch_budget(job, Layout.for_world(1), 1, "local", 8e9, on_gpu=True) == sum(job.lengths)
