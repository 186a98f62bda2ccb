"""Every form of an expert at layouts, in checkpoints of both formats, and through a run, by the registry."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mome_dist.checkpoint.reshard import reshard
from mome_dist.config import load_config
from mome_dist.export.adapter import export_adapter
from mome_dist.inference.load import load_run
from mome_dist.moe.forms.registry import DEFAULT, FORMS, find_form
from mome_dist.parallel.layout import Layout
from mome_dist.verification.cases import standard_cases
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verifier
from tests.contributed import add_form
from tests.parallel.resharding import STEPS, TAG, train_and_save
from tests.parallel.runs import Lab, evaluated
from tests.parallel.same_checkpoints import assert_engines_go_on, assert_same_files
from tests.parallel.worlds import run_world

ONE_VIEW_EACH = [
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[16]",
    "task.avsr_video_rates=[5]",
]
EXPERIMENT = ["experiment=tiny", "llm.precision=fp32", "parallel=single", *ONE_VIEW_EACH]
PREVIOUS = "mome.reads=previous"  # and `tests/unit/test_previous.py`
UNEQUAL = "mome=unequal"  # `tests/unit/test_expert_widths.py` has the rest
WITHOUT_ROUTER = "method=dense_bottleneck"
# The default has all layouts, and all kinds of checkpoints, in tests of its own.
OTHERS = [f"mome.expert={name}" for name in FORMS if name != DEFAULT]
CASES = {case.name: case for cases in (standard_cases(), standard_cases(experts=False)) for case in cases}
LAYOUTS = [
    *(
        (settings, case, optimizer)
        for settings in OTHERS
        for case, optimizer in (("ep2", "sgd"), ("ep2 gather", "adamw"), ("tp2 ep2 sp gather", "sgd"))
    ),
    *((settings, "pp2 ep2 interleaved", "adamw") for settings in OTHERS[:1]),
    (PREVIOUS, "ep2", "sgd"),
    (PREVIOUS, "tp2 ep2 sp gather", "adamw"),
    (UNEQUAL, "ep2", "adamw"),
    (UNEQUAL, "tp2 ep2 sp gather", "sgd"),
    *(
        (WITHOUT_ROUTER, case, optimizer)
        for case, optimizer in (("dp2 zero0", "sgd"), ("tp2 sp", "sgd"), ("tp2 pp2 zero2", "adamw"))
    ),
]


def _probe(folder: Path, settings: str) -> Probe:
    config = shrunk(load_config([*EXPERIMENT, settings, "optimizer.epsilon=1e-2"]), folder)
    config.mome.capacity_factor = None  # what a full expert drops depends on the layout
    return Probe(config, steps=3)


@pytest.mark.parametrize(("settings", "case", "optimizer"), LAYOUTS)
def test_layouts_train_as_one_process(tmp_path: Path, settings: str, case: str, optimizer: str) -> None:
    verdict = Verifier(_probe(tmp_path, settings)).check(CASES[case], optimizer)
    assert verdict.passed, (verdict.failure, verdict.comparison)


def test_the_example_of_the_contributors_page_trains_at_layouts(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        settings = f"mome={add_form(tmp_path, patch)}"
        for case, optimizer in (("ep2", "sgd"), ("tp2 ep2 sp gather", "adamw")):
            verdict = Verifier(_probe(tmp_path / f"{case} llm", settings)).check(CASES[case], optimizer)
            assert verdict.passed, (verdict.failure, verdict.comparison)
    find_form.cache_clear()


@pytest.mark.parametrize("settings", [*OTHERS, WITHOUT_ROUTER])
def test_engines_load_what_is_written_for_them(tmp_path: Path, settings: str) -> None:
    ep = 1 if settings == WITHOUT_ROUTER else 2
    probe, layout = _probe(tmp_path / "llm", settings), Layout.for_world(2, ep=ep)
    probe.config.optimizer = dataclasses.replace(probe.config.optimizer, warmup_steps=0)
    losses = run_world(train_and_save, 2, probe, layout, 1, tmp_path)[0]
    canonical = tmp_path / f"checkpoints/step-{STEPS:06d}"
    reshard(canonical, tmp_path / "mine", "deepspeed", layout, 1)
    assert_same_files(tmp_path / f"mine/global_step{STEPS}", tmp_path / "native" / TAG)
    there = {"pp2 last stage without layers": (Layout.for_world(2, pp=2, stage_layers=(4, 0)), 0)}
    assert_engines_go_on(probe, canonical, tmp_path, (layout, 1), there, losses)


@pytest.mark.parametrize("settings", OTHERS)
def test_each_trains_resumes_elsewhere_and_decodes(lab: Lab, tmp_path: Path, settings: str) -> None:
    more = [settings, "training.save_every=2", "optimizer.final_fraction=1", "mome.dispatch=auto"]
    whole = lab.train(1, tmp_path / "whole", *more, "training.steps=4")
    first = lab.train(2, tmp_path / "run", *more, "training.steps=2", ep=2)
    rest = lab.train(2, tmp_path / "run", *more, "training.steps=4", tp=2)
    assert all(map(math.isfinite, whole)) and len(whole) == 4
    assert first + rest == pytest.approx(whole, rel=1e-5)
    run = load_run(tmp_path / "run")
    assert run.step == 4 and f"mome.expert={run.config.mome.expert}" == settings
    export_adapter(tmp_path / "run", tmp_path / "export")
    exported, trained = load_run(tmp_path / "export").model.state_dict(), run.model.state_dict()
    assert exported.keys() == trained.keys() and all(torch.equal(exported[name], trained[name]) for name in trained)
    arguments = [f"checkpoint={tmp_path}/run", "limit=2", "max_new_tokens=3"]
    assert run_world(evaluated, 1, arguments, lab.cache) == [0]
