"""Many experts, narrow and wide ones; expert parallelism divides their memory."""

from __future__ import annotations

import pytest
import torch

from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.packed import counted, one_view
from tests.parallel.worlds import run_world


def _step(ep: int, experts: int, bottleneck: int, dispatch: str) -> tuple[int, float]:
    """Bytes of routed experts on this rank, and the output's sum, after a forward and a backward pass."""
    with parallel_world(Layout.for_world(ep, ep=ep), 0, timeout_seconds=60):
        module = ExpertParallelMoME(32, experts, 4, 1, bottleneck, ep_size=ep, dispatch=dispatch)
        module.set_deepspeed_parallelism()
        module.initialize("mome.0", seed=0)
        hidden = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
        output, _ = counted(module.train(), hidden, one_view(len(hidden)))
        output.square().sum().backward()
        routed = list(module.deepspeed_moe.experts.parameters())
        assert all(parameter.grad is not None for parameter in routed)
        return sum(p.numel() * p.element_size() for p in routed), float(output.sum())


@pytest.mark.parametrize("dispatch", ["alltoall", "gather"])
@pytest.mark.parametrize(("experts", "bottleneck"), [(512, 1), (8, 1024), (23, 12)])
def test_any_number_and_width_of_experts_runs(experts: int, bottleneck: int, dispatch: str) -> None:
    size, output = run_world(_step, 1, 1, experts, bottleneck, dispatch)[0]
    assert size == 4 * experts * (2 * 32 * bottleneck + bottleneck + 32)
    assert output == 0.0  # an untrained module adds nothing


@pytest.mark.parametrize("dispatch", ["alltoall", "gather"])
def test_expert_memory_falls_with_expert_parallelism(dispatch: str) -> None:
    sizes = [[size for size, _ in run_world(_step, ep, ep, 512, 4, dispatch)] for ep in (1, 2, 4)]
    whole = sizes[0][0]
    assert sizes == [[whole], [whole // 2] * 2, [whole // 4] * 4]
