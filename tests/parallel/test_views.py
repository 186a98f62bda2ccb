"""Drawn rates and weighted tasks: every layout trains them as one process does, and weights choose among the tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mome_dist.config import load_config
from mome_dist.config.derived import schedule_of
from mome_dist.parallel.layout import Layout
from mome_dist.training.batches import Step
from mome_dist.verification.compare import compare
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.run import Case, Outcome, merged, run_case
from mome_dist.verification.verify import Verifier
from tests.parallel.runs import Lab, lines
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel

PROBE = ["experiment=tiny", "llm.precision=fp32", "parallel=single", "task=omni"]
CASES = [
    Case("dp2", Layout.for_world(2), 1, "local"),
    Case("pp2", Layout.for_world(2, pp=2), 0, "local"),
    Case("tp2", Layout.for_world(2, tp=2), 1, "local"),
    Case("tp2 sp", Layout.for_world(2, tp=2, sequence_parallel=True), 0, "local"),
]


def _probe(folder: Path, *more: str) -> Probe:
    return Probe(shrunk(load_config([*PROBE, *more]), folder), steps=3)


@pytest.fixture(scope="module")
def without_experts(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(_probe(tmp_path_factory.mktemp("plain"), "mome=none"))


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(_probe(tmp_path_factory.mktemp("mome"), "mome.balance_loss=0.1"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layouts_train_as_one_process(without_experts: Verifier, case: Case) -> None:
    verdict = without_experts.check(case, "sgd")
    assert verdict.passed, (verdict.failure, verdict.comparison)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_with_experts_the_balance_loss_has_no_weights(with_experts: Verifier, case: Case) -> None:
    verdict = with_experts.check(case, "sgd")
    assert verdict.passed, (verdict.failure, verdict.comparison)


def test_a_projector_without_a_view_in_the_step(tmp_path: Path) -> None:
    verdict = Verifier(_probe(tmp_path, "mome=none", "projector.per_rate=true")).check(CASES[0], "adamw")
    assert verdict.passed, (verdict.failure, verdict.comparison)


def _forget_weights() -> None:
    Step.weights = property(lambda self: [1.0] * len(self.views))  # type: ignore[assignment]


def test_a_layout_that_forgets_the_weights_is_found_out(without_experts: Verifier) -> None:
    verdict = without_experts.check(CASES[0], "sgd", _forget_weights)
    assert verdict.comparison is not None
    assert {mismatch.what for mismatch in verdict.comparison.mismatches} >= {"loss", "gradient", "weight"}


ONE_PAIR = [f"task.{key}" for key in ("asr_audio_rates=[4]", "avsr_audio_rates=[4]")]
ONE_PAIR += [f"task.{key}" for key in ("vsr_video_rates=[2]", "avsr_video_rates=[2]")]


def _trained(folder: Path, case: Case, *method: str) -> Outcome:
    settings = ["experiment=tiny", "llm.precision=fp32", "parallel=single", *method]
    probe = Probe(shrunk(load_config(settings), folder), steps=3)
    return merged(run_world(run_case, case.layout.world_size, probe, case, "sgd", None))


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_omni_avsr_of_one_pair_of_rates_and_one_task_of_weight_is_llama_avsr(tmp_path: Path, case: Case) -> None:
    """Step for step; the other tasks' views are there, and count for nothing."""
    omni = ["method=omni_avsr/s", "video_encoder.lora=null", *ONE_PAIR]
    weighted = _trained(tmp_path / "omni", case, *omni, "task.weights={asr: 0, vsr: 0, avsr: 3}")
    alone = _trained(tmp_path / "alone", case, "method=llama_avsr", "projector.compression=pool")
    comparison = compare(weighted, alone)
    assert not comparison.mismatches and min(alone.norms) > 0, comparison
    assert any(name.startswith("llm_lora.") for name in alone.gradients)
    unweighted = _trained(tmp_path / "all", case, *omni, "task.weights={asr: 1, vsr: 1, avsr: 1}")
    assert compare(unweighted, alone).errors["gradient"] > 0.1


# Half of the projectors have no view in a step.
RUN = ["task=omni", "mome=none", "projector.per_rate=true", "training.validate_every=6", "optimizer.final_fraction=1"]
RUN += ["llm.sink_loss=0.1"]


def test_whole_runs_of_drawn_rates(lab: Lab, tmp_path: Path) -> None:
    one, weights = lab.train(1, tmp_path / "one", *RUN, "training.steps=6"), {"asr": 1.0, "vsr": 1.5, "avsr": 1.0}
    records = [record for record in lines(tmp_path / "one/metrics.jsonl") if "loss" in record]
    schedule = schedule_of(load_config(lab.overrides(tmp_path, *RUN)))
    for number, record in enumerate(records):
        assert list(record["views"]) == [str(view) for view in schedule.of_step(number)]
        weighted = [weights[name.partition("(")[0]] * loss for name, loss in record["views"].items()]
        assert record["loss"] == pytest.approx(sum(weighted) / 3, rel=1e-6)
        assert 0 < record["sink_loss"] < 1, "a mean of squared cosines"
    (validation,) = (record for record in lines(tmp_path / "one/metrics.jsonl") if "validation" in record)
    assert len(validation["validation"]) == 8, "validation sees every view"
    for name, tp, pp in (("dp2", 1, 1), ("pp2", 1, 2), ("tp2", 2, 1)):
        losses = lab.train(2, tmp_path / name, *RUN, "training.steps=6", tp=tp, pp=pp)
        np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=name)
    begun = lab.train(1, tmp_path / "begun", *RUN, "training.steps=3")
    assert begun + lab.train(1, tmp_path / "begun", *RUN, "training.steps=6") == one


def test_what_experts_do_in_views_of_no_weight_is_not_asked_for(lab: Lab, tmp_path: Path) -> None:
    """Some of many experts are chosen in VSR alone: they have no gradient, and the ledger lets them."""
    more = ["mome.routed_experts=128", "mome.top_k=1", "mome.renormalize=false", "mome.balance_loss=0"]
    losses = lab.train(1, tmp_path, "task=omni", *more, "task.weights={asr: 1, vsr: 0, avsr: 1}", "training.steps=7")
    assert len(losses) == 7 and losses[-1] < losses[0]
