"""The choice of dispatch at extremes where anyone can tell the answer, and against its own arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mome_dist.moe.dispatch.cost import LayerLoad, Rates, choose

MOME = LayerLoad(
    tokens=704,
    hidden_size=2048,
    experts=24,
    shared=1,
    top_k=4,
    bottleneck=12,
    capacity_factor=None,
    element_bytes=2,
    frozen_flops=0.0,
)
WIDE = replace(MOME, experts=64, bottleneck=128)
CPU = Rates(
    dense_flops=2e11,
    batched_flops=1.5e11,
    router_flops=5e10,
    copy_bytes=1e10,
    link_bytes=1e9,
    latency=1e-4,
    call=3e-6,
)


@pytest.mark.parametrize(("ep", "name"), [(1, "local"), (2, "gather"), (8, "gather")])
def test_weights_of_tiny_experts_travel_or_stay(ep: int, name: str) -> None:
    assert choose(MOME, CPU, ep).name == name


@pytest.mark.parametrize("ep", [1, 8])
def test_many_wide_experts_are_not_worth_computing_for_every_token(ep: int) -> None:
    assert choose(WIDE, replace(CPU, dense_flops=5e10, batched_flops=4e10), ep).name == "alltoall"


def test_a_slow_link_keeps_the_larger_load_off_it() -> None:
    # At ep 2 the weights of 24 experts of 12 units are 7 MB, the tokens 46 MB: on a slow link nothing else counts.
    slow = replace(CPU, link_bytes=1e6)
    assert choose(MOME, slow, 2).name == "gather"
    # 64 experts of 128 units are 101 MB of weights: now the tokens are the smaller load, whatever computing costs.
    unequal = replace(slow, dense_flops=1e20, batched_flops=1e10)
    assert choose(WIDE, unequal, 2).name == "alltoall"


def test_fast_products_make_few_large_ones_better_than_many_copies() -> None:
    assert choose(replace(WIDE, experts=8), replace(CPU, dense_flops=1e15, batched_flops=1e15), 1).name == "local"


def test_weights_that_travel_beside_the_frozen_layer_cost_nothing() -> None:
    slow = replace(CPU, link_bytes=1e8)
    hidden = replace(MOME, frozen_flops=slow.dense_flops)  # a second of work
    exposed, beside = choose(MOME, slow, 2).seconds, choose(hidden, slow, 2).seconds
    weights = 24 * (2 * 12 * 2048 + 12 + 2048) * (2 + 4) / 2  # half of them are away; bf16 there, fp32 back
    assert exposed["gather"] - beside["gather"] == pytest.approx(weights / 1e8)
    assert exposed["alltoall"] == beside["alltoall"]


def test_a_capacity_factor_bounds_the_tokens_on_the_wire() -> None:
    tokens = {
        factor: choose(replace(MOME, capacity_factor=factor), replace(CPU, link_bytes=1e3), 2).seconds["alltoall"]
        for factor in (1.0, 2.0)
    }
    row_bytes = 704 * 4 * 2048 * 2
    assert tokens[2.0] - tokens[1.0] == pytest.approx(4 * row_bytes / 2 / 1e3, rel=1e-3)


def test_slow_calls_count_for_every_expert_of_the_rank() -> None:
    calls = {
        ep: choose(MOME, replace(CPU, call=1.0), ep).seconds["alltoall"] - choose(MOME, CPU, ep).seconds["alltoall"]
        for ep in (1, 2)
    }
    assert calls[1] > calls[2] > 0


def test_reasons_name_bytes_and_flops_of_every_candidate() -> None:
    choice = choose(MOME, CPU, 2)
    dense_gflop = 3 * 4 * 704 * 25 * 12 * 2048 / 1e9
    by_name = dict(reason.split(": ", 1) for reason in choice.reasons)
    assert set(by_name) == set(choice.seconds) == {"gather", "alltoall"}
    assert f"{dense_gflop:.2f} GFLOP" in by_name["gather"]
    assert f"{24 * (2 * 12 * 2048 + 12 + 2048) * 3 / 1e6:.2f} MB of weights on the wire" in by_name["gather"]
    assert f"{4 * 704 * 4 * 2 * 2048 * 2 / 2 / 1e6:.2f} MB of tokens on the wire" in by_name["alltoall"]
    for name, reason in by_name.items():
        assert reason.endswith(f"{choice.seconds[name] * 1e3:.1f} ms a layer")


def test_the_cheapest_is_chosen() -> None:
    for load in (MOME, WIDE):
        choice = choose(load, CPU, 4)
        assert choice.seconds[choice.name] == min(choice.seconds.values())
