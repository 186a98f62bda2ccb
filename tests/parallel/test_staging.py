"""Messages between pipeline stages through the memory of the host, as ranks that share a GPU send them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication

from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.staging import messages_over_the_host
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.verify import Verifier
from tests.parallel.worlds import run_world

PIPELINES = {case.name: case for case in standard_cases() if case.name in ("pp2", "pp2 interleaved")}


def _stage_messages() -> None:
    messages_over_the_host().__enter__()


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_trains_the_same_through_the_host(verifier: Verifier, name: str) -> None:
    verdict = verifier.check(PIPELINES[name], "adamw", plant=_stage_messages)
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _one_message() -> tuple[list[float], list[float]]:
    """What rank 1 holds of a message before and after it waits for it; the sender overwrites its own at once."""
    with parallel_world(Layout.for_world(2), 0, timeout_seconds=60) as at, messages_over_the_host():
        names = p2p_communication.torch.distributed
        tensor = torch.full((2, 3), float(1 - at.dp)).t()  # not contiguous
        operation = names.isend if at.dp == 0 else names.irecv
        (work,) = names.batch_isend_irecv([names.P2POp(operation, tensor, 1 - at.dp, dist.group.WORLD)])
        if at.dp == 0:
            tensor.fill_(-1)
            work.wait()
        dist.barrier()  # the message has arrived
        before = tensor.flatten().tolist()
        if at.dp == 1:
            work.wait()
        return before, tensor.flatten().tolist()


def test_a_message_is_a_copy_on_both_sides() -> None:
    assert run_world(_one_message, 2)[1] == ([0.0] * 6, [1.0] * 6)
    assert p2p_communication.torch is torch
