"""The operations that a MoME module calls, counted where they run, against the planner's constants."""

from __future__ import annotations

import pytest
import torch

from benchmarks.operations import Operations
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.moe.load import PassLoad
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.planning.experts import DENSE_CALLS, ROW_CALLS
from tests.packed import one_view
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel


def _calls(dispatch: str, experts: int) -> int:
    """Calls of a forward and backward pass with the balance loss, in bf16."""
    layer = ExpertParallelMoME(64, experts, 4, 1, 12, ep_size=torch.distributed.get_world_size(), dispatch=dispatch)
    layer.set_deepspeed_parallelism()
    layer.initialize("counted", 0)
    torch.manual_seed(0)
    hidden_TH = torch.randn(256, 64, dtype=torch.bfloat16).requires_grad_()
    context = one_view(len(hidden_TH))
    load = PassLoad(context.view_names, None)
    with Operations() as forward:
        layer.train().prefetch(hidden_TH.dtype)
        output_TH = layer(hidden_TH, context, load)
    load.reduce()  # once for all layers of a pass
    with Operations() as backward:
        output_TH.backward(torch.ones_like(output_TH))
    return forward.count + backward.count


def _counts(world: int, weights: str) -> dict[str, list[int]]:
    with parallel_world(Layout.for_world(world, ep=world), 0, timeout_seconds=60):
        return {dispatch: [_calls(dispatch, n) for n in (8, 24, 48)] for dispatch in (weights, "alltoall")}


@pytest.mark.parametrize(("world", "weights"), [(1, "local"), (2, "gather")])
def test_experts_are_called_together_whatever_their_number(world: int, weights: str) -> None:
    for counts in run_world(_counts, world, world, weights):
        for dispatch, planned in ((weights, DENSE_CALLS), ("alltoall", ROW_CALLS)):
            assert len(set(counts[dispatch])) == 1, "a call for each expert"
            assert counts[dispatch][0] == pytest.approx(planned, rel=0.13)
