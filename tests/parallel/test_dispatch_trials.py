"""``mome.dispatch=auto`` tries the dispatches of a layer where the run will be."""

from __future__ import annotations

import time

import pytest
import torch
from deepspeed.utils import groups

from mome_dist.moe.dispatch.cost import LayerLoad, Rates, choose, measure
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from tests.parallel.worlds import run_world


def _load(tokens: int, hidden_size: int, experts: int, bottleneck: int) -> LayerLoad:
    return LayerLoad(tokens, hidden_size, experts, 1, 4, bottleneck, None, element_bytes=4, frozen_flops=0.0)


def _measured(ep: int, load: LayerLoad) -> tuple[Rates, float, bool]:
    """What this rank measures, in how many seconds, and whether it left the random numbers alone."""
    with parallel_world(Layout.for_world(ep, ep=ep), 0, timeout_seconds=60):
        group = groups._get_expert_parallel_group(f"ep_size_{ep}")
        state, began = torch.get_rng_state(), time.perf_counter()
        rates = measure(load, group, torch.float32, torch.device("cpu"))
        return rates, time.perf_counter() - began, torch.get_rng_state().equal(state)


@pytest.mark.parametrize("ep", [1, 2])
def test_trying_is_quick_and_all_ranks_agree(ep: int) -> None:
    measured = run_world(_measured, ep, ep, _load(64, 64, 24, 12))
    for rates, seconds, untouched in measured:
        assert rates == measured[0][0] and untouched
        assert set(rates.seconds) == {"alltoall", "gather" if ep > 1 else "local"}
        assert all(value > 0 for value in rates.seconds.values())
        assert seconds < 10  # a few tenths on an idle machine


def test_what_cannot_win_is_not_tried() -> None:
    """Five hundred experts for every token, where each token wants four of them."""
    load = _load(1024, 256, 512, 64)
    ((rates, _, _),) = run_world(_measured, 1, 1, load)
    assert set(rates.seconds) == {"alltoall"}
    assert choose(load, rates, 1).name == "alltoall"
