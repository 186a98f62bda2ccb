"""The choice of dispatch at extremes where anyone can tell the answer, and against its own arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mome_dist.moe.dispatch.cost import Choice, LayerLoad, Rates, choose

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
WEIGHTS = 24 * (2 * 12 * 2048 + 12 + 2048)


def _rates(load: LayerLoad, ep: int, *, flops: float = 2e11, link: float = 1e9, copies: float = 1e10) -> Rates:
    """What trying would give on a machine of these rates, by the definition of what each dispatch does: its products,
    four passes over the chosen rows (there and back, forward and backward), and what travels."""
    chosen = load.chosen_flops / flops + 4 * load.rows * load.hidden_size * load.element_bytes / copies
    seconds = {
        "gather" if ep > 1 else "local": load.dense_flops / flops + load.weight_bytes(ep) / link,
        "alltoall": chosen + load.token_bytes(ep) / link,
    }
    return Rates(seconds, flops, link)


def _choose(load: LayerLoad, ep: int, **machine: float) -> Choice:
    return choose(load, _rates(load, ep, **machine), ep)


@pytest.mark.parametrize(("ep", "name"), [(1, "local"), (2, "gather"), (8, "gather")])
def test_weights_of_tiny_experts_travel_or_stay(ep: int, name: str) -> None:
    assert _choose(MOME, ep, copies=5e8).name == name


@pytest.mark.parametrize("ep", [1, 8])
def test_many_wide_experts_are_not_worth_computing_for_every_token(ep: int) -> None:
    assert _choose(WIDE, ep, flops=5e10).name == "alltoall"


def test_a_slow_link_keeps_the_larger_load_off_it() -> None:
    # At ep 2 the weights of 24 experts of 12 units are 4 MB, the tokens 23 MB: on a slow link nothing else counts.
    assert MOME.weight_bytes(2) < 4e6 and MOME.token_bytes(2) > 23e6
    assert _choose(MOME, 2, link=1e6).name == "gather"
    # 64 experts of 128 units are 101 MB of weights: now the tokens are the smaller load, whatever computing costs.
    assert WIDE.weight_bytes(2) > 100e6
    assert _choose(WIDE, 2, link=1e6, flops=1e20).name == "alltoall"


def test_fast_products_make_few_large_ones_better_than_many_copies() -> None:
    assert _choose(replace(WIDE, experts=8), 1, flops=1e15).name == "local"


def test_weights_that_travel_beside_the_frozen_layer_cost_nothing() -> None:
    rates = _rates(MOME, 2, link=1e8)
    travel = WEIGHTS * (2 + 4) / 2 / 1e8  # half of them are away; bf16 there, fp32 back
    exposed = choose(MOME, rates, 2).seconds
    beside = choose(replace(MOME, frozen_flops=rates.dense_flops), rates, 2).seconds  # a second of work
    partly = choose(replace(MOME, frozen_flops=0.25 * travel * rates.dense_flops), rates, 2).seconds
    assert exposed == dict(rates.seconds)
    assert exposed["gather"] - beside["gather"] == pytest.approx(travel)
    assert exposed["gather"] - partly["gather"] == pytest.approx(travel / 4)
    assert exposed["alltoall"] == beside["alltoall"] == partly["alltoall"]


def test_hiding_never_goes_below_the_products() -> None:
    rates = Rates({"gather": 0.01, "alltoall": 0.01}, dense_flops=MOME.dense_flops / 0.008, link_bytes=1e6)
    hidden = replace(MOME, frozen_flops=1e20)
    assert choose(hidden, rates, 2).seconds["gather"] == pytest.approx(0.008)


def test_a_capacity_factor_bounds_the_tokens_on_the_wire() -> None:
    row_bytes = 704 * 4 * (4 * 2048 * 2 + 2 * 4)  # hidden values four times, gates and their gradients
    assert MOME.token_bytes(2) == row_bytes / 2
    assert replace(MOME, capacity_factor=0.5).token_bytes(2) == row_bytes / 4
    # Room for more than what asks for it changes nothing: no slot is ever sent empty.
    assert replace(MOME, capacity_factor=2.0).token_bytes(2) == row_bytes / 2


def test_a_dispatch_that_was_not_tried_is_not_chosen_for_it() -> None:
    tried = Rates({"alltoall": 0.1}, dense_flops=WIDE.dense_flops / 0.3, link_bytes=1e9)
    choice = choose(WIDE, tried, 2)
    assert choice.name == "alltoall"
    assert choice.seconds["gather"] == pytest.approx(0.3 + WIDE.weight_bytes(2) / 1e9)
    assert "not tried" in choice.reasons[0] and "not tried" not in choice.reasons[1]


def test_reasons_name_bytes_and_flops_of_every_candidate() -> None:
    choice = _choose(MOME, 2)
    dense_gflop, chosen_gflop = (3 * 4 * 704 * experts * 12 * 2048 / 1e9 for experts in (25, 5))
    by_name = dict(reason.split(": ", 1) for reason in choice.reasons)
    assert set(by_name) == set(choice.seconds) == {"gather", "alltoall"}
    assert f"{dense_gflop:.2f} GFLOP" in by_name["gather"]
    assert f"{chosen_gflop:.2f} GFLOP" in by_name["alltoall"]
    assert f"{WEIGHTS * 3 / 1e6:.2f} MB of weights on the wire" in by_name["gather"]
    assert f"{MOME.token_bytes(2) / 1e6:.2f} MB of tokens on the wire" in by_name["alltoall"]
    for name, reason in by_name.items():
        assert reason.endswith(f"{choice.seconds[name] * 1e3:.1f} ms a layer")


def test_the_cheapest_is_chosen() -> None:
    for load in (MOME, WIDE):
        choice = _choose(load, 4)
        assert choice.seconds[choice.name] == min(choice.seconds.values())
