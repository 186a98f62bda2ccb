"""Every layout trains the model that one process trains: losses, every gradient, the gradient norm, weights."""

from __future__ import annotations

import pytest

from mome_dist.verification.cases import standard_cases
from mome_dist.verification.run import Case
from mome_dist.verification.verify import OPTIMIZERS, Verifier

CASES = standard_cases()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_layout_equals_hugging_face_in_one_process(verifier: Verifier, case: Case) -> None:
    for optimizer in OPTIMIZERS:
        verdict = verifier.check(case, optimizer)
        assert verdict.failure is None, verdict.failure
        assert verdict.passed, (optimizer, verdict.comparison)


def test_the_standard_list_covers_every_axis_up_to_eight_processes() -> None:
    layouts = [case.layout for case in CASES]
    assert len(CASES) >= 24 and max(layout.world_size for layout in layouts) == 8
    for axis in ("tp", "pp", "ep", "dp", "virtual"):
        assert any(getattr(layout, axis) > 1 for layout in layouts), axis
    assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
    assert {case.dispatch for case in CASES} == {"alltoall", "gather", "local"}
    assert {case.zero for case in CASES} == {0, 1, 2}
    assert {case.placement for case in CASES} == {None, "mhsa", "ffn", "layer"}
