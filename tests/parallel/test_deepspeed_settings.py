"""Every DeepSpeed setting that acts leaves what is trained alone, and a planted one that does not is found, by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mome_dist.config import RunConfig, load_config
from mome_dist.config.deepspeed.file import settled
from mome_dist.config.deepspeed.keys import ZERO
from mome_dist.config.deepspeed.rules import Acts
from mome_dist.config.schema import OptimizerConfig
from mome_dist.engine.engine import Engine
from mome_dist.model.build import build_distributed
from mome_dist.parallel.device import current_device
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.training.step import forward_backward
from mome_dist.tuning.forked import timed_steps
from mome_dist.tuning.outcome import Outcome
from mome_dist.tuning.search import Measured, tune
from mome_dist.tuning.space import Trial, zero_settings
from mome_dist.verification.compare import explain
from mome_dist.verification.probe import Probe, wake, write_random_llama
from mome_dist.verification.run import Case
from mome_dist.verification.verify import Verifier
from tests.deepspeed_configurations import PUBLIC, public, stripped
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world

STEPS = 9  # every view three times
SGD = OptimizerConfig(name="sgd", learning_rate=0.5, gradient_clipping=0.0)


def _zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


# Small buckets, so that what they cut is cut: the model's largest tensors have some thousand elements.
ACTING = [
    _zero(1),
    _zero(1, reduce_bucket_size=1, allgather_bucket_size=2, parameter_alignment=True),
    _zero(1, reduce_bucket_size=500, overlap_comm=True),
    _zero(1, reduce_bucket_size=500, use_multi_rank_bucket_allreduce=False),
    _zero(2),
    _zero(2, reduce_bucket_size=1, allgather_bucket_size=2, parameter_alignment=True),
    _zero(2, reduce_bucket_size=500, overlap_comm=True),
    _zero(2, reduce_bucket_size=500, use_multi_rank_bucket_allreduce=False),
]
# Refused in a file; told to DeepSpeed here all the same, to see that the comparison would find them.
PLANTED = {
    "sum": {**_zero(1), "gradient_allreduce_op": "sum"},
    "offload": {**_zero(1, offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": False},
}


def _one_view_each(probe: Probe) -> list[Probe]:
    """The probe with each of its views by itself."""
    single = []
    for view in probe.views:
        config = dataclasses.replace(probe.config)
        config.task = dataclasses.replace(config.task, tasks=[view.task])
        single.append(dataclasses.replace(probe, config=config))
        assert single[-1].views == [view]
    return single


def _train_each(probe: Probe, all_settings: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Losses of the same training in each of some DeepSpeed settings, one after the other in this rank's world.

    Each step has one view, in turn, so that modules of other views get no gradient in it.
    """
    config, layout, in_turn = probe.config, Layout.for_world(2), _one_view_each(probe)
    losses: list[list[float]] = []
    with parallel_world(layout, config.seed, 60) as at:
        for settings in all_settings:
            model = build_distributed(config, layout, probe.widths, "local", current_device()).train()
            wake(model.trained_parts(), config.seed)
            engine = Engine(model, SGD, settings)
            losses.append([])
            for number in range(STEPS):
                step = in_turn[number % len(in_turn)].step(number, at.dp, layout)
                with engine.accumulate():
                    losses[-1].append(forward_backward(model, step).loss)
                engine.step(SGD.learning_rate)
            engine.deepspeed.destroy()
    return losses


def _acts_of_public(config: RunConfig) -> list[dict[str, Any]]:
    """What acts of the public configurations, each once."""
    acts = [stripped(public(name), config, 2).acts for name in PUBLIC]
    return list({json.dumps(each, sort_keys=True): each for each in acts}.values())


def test_what_acts_trains_the_same_and_what_is_refused_would_not(verifier: Verifier) -> None:
    config = verifier.probe.config
    of_public = _acts_of_public(config)
    settings = [_zero(0), *ACTING, *of_public, *PLANTED.values()]
    ranks = run_world(_train_each, 2, verifier.probe, settings, timeout=400)
    assert ranks[0] == ranks[1]
    expected, *others = ranks[0]
    same, planted = others[: -len(PLANTED)], others[-len(PLANTED) :]
    assert len(expected) == STEPS and len(same) == len(ACTING) + len(of_public) and len(of_public) >= 6
    for each, losses in zip(settings[1:], same, strict=False):
        np.testing.assert_allclose(losses, expected, rtol=1e-7, err_msg=str(each))
    for name, losses in zip(PLANTED, planted, strict=True):
        assert not np.allclose(losses, expected, rtol=1e-4), name


def test_every_acting_key_is_in_that_proof(verifier: Verifier) -> None:
    proven = {key for each in ACTING for key in each["zero_optimization"]}
    assert proven == {key for key, rule in ZERO.items() if isinstance(rule, Acts)}
    for each in ACTING:
        assert settled(each, verifier.probe.config, 2, "it").acts == each


@pytest.mark.parametrize("zero", [0, 1])
def test_the_verification_names_a_planted_sum(verifier: Verifier, zero: int) -> None:
    case = Case("dp2", Layout.for_world(2), zero, deepspeed={"gradient_allreduce_op": "sum"})
    verdict = verifier.check(case, "sgd")
    assert verdict.comparison is not None and not verdict.passed
    spelled = {
        explain(each.ratio, case.layout, microbatches=6)
        for each in verdict.comparison.mismatches
        if each.what == "gradient"
    }
    assert spelled == {"2.00 = dp"}


@pytest.mark.parametrize("zero", [1, 2])
def test_a_layout_is_verified_with_all_that_acts(verifier: Verifier, zero: int) -> None:
    everything = {key: value for each in ACTING for key, value in each["zero_optimization"].items()}
    settings = {"zero_optimization": {**everything, "reduce_bucket_size": 500}}
    verdict = verifier.check(Case("ep2", Layout.for_world(2, ep=2), zero, deepspeed=settings), "sgd")
    assert verdict.passed, verdict


def test_the_tuner_drops_what_trains_differently(tmp_path: Path) -> None:
    words = ["experiment=tiny", "mome.capacity_factor=null", "task.tasks=[asr]", "task.views_per_step=null"]
    config, llm = load_config([*words, "data.batch_size=8"]), write_random_llama(tmp_path)

    class Unchecked:
        """Tells DeepSpeed whatever a trial says."""

        def run(self, trial: Trial) -> Outcome:
            return Outcome(tuple(run_world(timed_steps, 2, config, llm, trial.deepspeed, 4)[0]))

    trials = [Trial(zero_settings(1)), Trial({**zero_settings(2), "gradient_allreduce_op": "sum"})]
    told: list[Measured] = []
    found = tune(trials, Unchecked(), lambda _: None, lambda _: [], 1, 5, told.append)
    assert found is not None and found.best.trial == trials[0]
    right, wrong = found.measured
    assert right.failure is None and str(wrong.failure).startswith("trains differently: gradient norm ")
    assert told.count(wrong) == 2, "once when it ran, once when it was compared"


def test_moments_are_found_again_where_settings_put_them(
    lab: Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {**_zero(2, parameter_alignment=True), "steps_per_print": 5}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = [f"deepspeed.file={tmp_path / 'ds.json'}", "training.steps=6", "training.save_every=3"]
    losses = lab.train(2, tmp_path / "run", *words)
    said = " ".join(capfd.readouterr().err.split())
    assert "ZeRO 2, parameter_alignment=true; without effect here: steps_per_print" in said
    np.testing.assert_allclose(
        lab.train(2, tmp_path / "plain", "training.steps=6", "deepspeed=zero0"), losses, rtol=1e-5
    )
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    (tmp_path / "run/checkpoints/latest").write_text("step-000003")
    assert lab.train(2, tmp_path / "run", *words) == losses[3:]
