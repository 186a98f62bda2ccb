"""How many operations a training step starts: on a GPU, Python has to ask for each of them."""

from __future__ import annotations

import json

from benchmarks.launches import LAYERS, PYTORCH, TRITON, counted
from benchmarks.results import RESULTS

FOUR_PADDED_PASSES = 22_400  # counted before sequences were packed: one pass of 28 layers for each of four views


def test_a_step_starts_a_fifth_of_what_four_passes_did() -> None:
    counts = counted()
    assert counts["frozen layer"]["forward"] <= 24
    assert 5 * sum(counts[f"a pass of {LAYERS} layers, {PYTORCH}"].values()) <= FOUR_PADDED_PASSES
    module = counts[f"MoME module, {TRITON}"]
    assert module["forward"] <= 14 and module["backward"] <= 24
    committed = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))["figures"]
    assert counts == committed, "run: python -m benchmarks.launches"
