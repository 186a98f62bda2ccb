"""What fine views teach coarse ones: in every layout what one process is taught, and nothing where it is off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mome_dist.aligned_tokens import Aligned
from mome_dist.config import load_config
from mome_dist.moe.route_distillation import RouteDistillation
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verifier
from tests.parallel.cases import SP, by_name, case
from tests.parallel.runs import Lab, lines

pytestmark = pytest.mark.parallel


CASES = by_name(
    case("dp2", 2, 2),
    case("tp2", 2, 0, tp=2),
    case("tp2 sp", 2, **SP),
    case("pp2 interleaved", 2, pp=2, virtual=2),
    case("tp2 ep2 sp recompute", 4, 1, "alltoall", ep=2, recompute="full", **SP),
)
# As large as the cross-entropy's gradient; rates that divide each other (audio) and that do not (video).
PROBE = ["experiment=tiny", "llm.precision=fp32", "parallel=single", "task.tasks=[avsr]"]
TERMS = ["task.cross_rate.route_kl=20", "task.cross_rate.logit_kl=0.5"]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(Probe(shrunk(load_config([*PROBE, *TERMS]), tmp_path_factory.mktemp("taught")), steps=2))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "adamw" if name == "pp2 interleaved" else "sgd") for name in CASES],
)
def test_layouts_train_as_one_process(verifier: Verifier, name: str, optimizer: str) -> None:
    verdict = verifier.check(CASES[name], optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _targets_of_a_rank_alone() -> None:
    def alone(self: RouteDistillation, targets_LME: Tensor) -> None:
        targets_LME.add_(1e-6)  # whatever teaches on another rank alone is taken for an even route

    RouteDistillation._begin_sum = alone  # type: ignore[method-assign]


def _mean_of_a_rank() -> None:
    part = Aligned.to

    def doubled(self: Aligned, device: Any) -> Aligned:
        moved = part(self, device)
        return Aligned(moved.pairs, moved.rows_M, moved.fine_MW, moved.shares_MW, 2 * moved.weights_QM)

    Aligned.to = doubled  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(("fault", "name"), [(_targets_of_a_rank_alone, "tp2 sp"), (_mean_of_a_rank, "dp2")])
def test_the_verification_catches(verifier: Verifier, fault: Callable[[], None], name: str) -> None:
    verdict = verifier.check(CASES[name], "sgd", plant=fault)
    assert not verdict.passed and verdict.failure is None and verdict.comparison is not None
    assert {"cross-rate loss", "gradient"} <= {mismatch.what for mismatch in verdict.comparison.mismatches}


def test_a_run_logs_what_each_view_is_taught_and_continues_as_if_never_stopped(lab: Lab, tmp_path: Path) -> None:
    run = [
        "task=avsr",
        "task.cross_rate.route_kl=0.1",
        "task.cross_rate.logit_kl=0.1",
        "task.views_per_step=3",
        "optimizer.final_fraction=1",
    ]
    whole = lab.train(1, tmp_path / "whole", *run, "training.steps=4")
    begun = lab.train(1, tmp_path / "begun", *run, "training.steps=2")
    assert begun + lab.train(1, tmp_path / "begun", *run, "training.steps=4") == whole
    records = lines(tmp_path / "whole/metrics.jsonl")
    assert sum("route_kl" in record for record in records) >= 3, "a drawn step may have no view that is finer"
    for record in records:
        for term in ("route_kl", "logit_kl") if "route_kl" in record else ():
            assert record[term] and all(value > 0 for value in record[term].values()), term
            assert all(set(pair.split(">")) <= set(record["views"]) for pair in record[term])
    untaught = lab.train(1, tmp_path / "without", *run[:1], *run[3:], "training.steps=2")
    assert untaught[0] == begun[0] and untaught[1] != begun[1], "the loss that is told has no such term; weights do"
