"""Tokens travel while the frozen module beside the experts computes, and nothing that is computed changes by it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mome_dist.moe.dispatch.exchange import Exchange
from mome_dist.moe.expert_parallel import ExpertParallelMoME
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case, Outcome, run_case
from tests.parallel.worlds import run_world
from tests.probes import small_probe


def _watched(probe: Probe, placement: str, late: bool) -> tuple[Outcome, list[str]]:
    """One of two expert-parallel ranks, and what happens in its first layer, forward and backward."""
    from mome_dist.llm import megatron

    events: list[str] = []
    start, land = Exchange.start, Exchange.land

    def started(self: Exchange, *given: Any) -> None:
        events.append("travels")
        start(self, *given)

    def landed(self: Exchange) -> Any:
        events.append("landed")
        return land(self)

    # What the frozen module does last before its output.
    frozen: Any = megatron.CausalAttention.forward if placement == "mhsa" else megatron.swiglu

    def computed(*given: Any, **named: Any) -> Any:
        events.append(placement)
        return frozen(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "start", started)
        patch.setattr(Exchange, "land", landed)
        if placement == "mhsa":
            patch.setattr(megatron.CausalAttention, "forward", computed)
        else:
            patch.setattr(megatron, "swiglu", computed)
        if late:
            patch.setattr(ExpertParallelMoME, "begin", lambda self, *given: partial(self, *given))
        case = Case("", Layout.for_world(2, ep=2), dispatch="alltoall", placement=placement)
        return run_case(probe, case, "adamw", None), events


@pytest.mark.parametrize("placement", ["mhsa", "ffn"])
def test_tokens_travel_beside_the_frozen_module_and_change_no_bit(tmp_path: Path, placement: str) -> None:
    probe = small_probe(tmp_path, 2)
    ranks = [run_world(_watched, 2, probe, placement, late) for late in (False, True)]
    for (early, events), (late, others) in zip(*ranks, strict=True):
        assert events[:4] == ["travels", "travels", placement, "landed"]
        assert others[:4] == [placement, "travels", "travels", "landed"]
        assert early.losses == late.losses and early.norms == late.norms
        for ours, theirs in ((early.gradients, late.gradients), (early.weights, late.weights)):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert np.array_equal(value, theirs[name]), name
