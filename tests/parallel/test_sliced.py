"""A module that is sliced over tensor-parallel ranks trains as in one process, and no slice of it is ever lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from mome_dist.engine.engine import Engine
from mome_dist.parallel.layout import Layout
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case
from mome_dist.verification.verify import Verifier
from tests.parallel import sliced
from tests.probes import small_probe

CASES = [
    Case("one process", Layout.for_world(1), 1, "local"),
    Case("tp2 zero0", Layout.for_world(2, tp=2), 0, "local"),
    Case("tp2 zero1", Layout.for_world(2, tp=2), 1, "local"),
    Case("tp2 sp zero2", Layout.for_world(2, tp=2, sequence_parallel=True), 2, "local"),
    Case("tp2 sp zero0", Layout.for_world(2, tp=2, sequence_parallel=True), 0, "alltoall"),
    Case("tp2 ep2 sp zero1", Layout.for_world(4, tp=2, ep=2, sequence_parallel=True), 1, "gather"),
    Case("tp2 pp2 zero0", Layout.for_world(4, tp=2, pp=2), 0, "local"),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return small_probe(tmp_path_factory.mktemp("llama"), steps=3)


@pytest.fixture(scope="module")
def verifier(probe: Probe) -> Iterator[Verifier]:
    with pytest.MonkeyPatch.context() as patch:
        sliced.attach(patch)
        yield Verifier(probe)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_slices_train_as_one_process(verifier: Verifier, case: Case, optimizer: str) -> None:
    verdict = verifier.check(case, optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _slices_added_up() -> None:
    """What a reduction would do that takes whatever is no expert for a copy."""
    summed = Engine._sum_over_sequence

    def all_of_them(self: Engine) -> None:
        summed(self)
        for parameter, sharing in self._sharing.items():
            if sharing.sliced is not None:
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())

    Engine._sum_over_sequence = all_of_them  # type: ignore[method-assign]


def _norm_of_the_first_slice() -> None:
    Engine._is_sliced = lambda self, parameter: False  # type: ignore[method-assign]


def _norm_of_the_first_slice_under_zero() -> None:
    accumulate = Engine.accumulate

    @contextmanager
    def unmarked(self: Engine) -> Iterator[None]:
        for parameter in self._sharing:
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        with accumulate(self):
            yield

    Engine.accumulate = unmarked  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "case", "name"),
    [
        (_slices_added_up, "tp2 zero1", "adapter."),
        (_norm_of_the_first_slice, "tp2 zero0", "step"),
        (_norm_of_the_first_slice_under_zero, "tp2 zero1", "step"),
    ],
)
def test_the_verification_catches(verifier: Verifier, fault: Callable[[], None], case: str, name: str) -> None:
    verdict = verifier.check(BY_NAME[case], "sgd", plant=fault)
    assert not verdict.passed
    found = verdict.comparison.mismatches if verdict.comparison is not None else ()
    assert verdict.failure is not None or any(name in mismatch.name for mismatch in found), (verdict.failure, found)
