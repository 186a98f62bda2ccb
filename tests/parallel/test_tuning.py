"""The tuner on real worlds: it ends with settings at least as fast as all hand-picked ones, whatever some trials do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mome_dist.tuning.space import Trial, zero_settings
from mome_dist.tuning.trial import LaunchedRunner
from tests.parallel.runs import Lab

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["task.tasks=[asr]", "task.asr_audio_rates=[4]", "task.views_per_step=null", "data.batch_size=8"]


@pytest.mark.parallel
def test_a_search_with_trials_that_fail(tmp_path: Path) -> None:
    trials: list[dict[str, Any]] = [
        # More elements than any machine has memory for, and a word where a number belongs.
        {"deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**13}}},
        {"deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}}},
        {"deepspeed": {"zero_optimization": {"stage": 1}}, "overrides": {"parallel.ep": "3"}},
    ]
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    command = [sys.executable, "tools/tune_deepspeed.py", "--shrink", "--nproc", "2", "--steps", "3", "--rounds", "1"]
    command += ["--most", "18", "--trials", str(tmp_path / "trials.json"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "experiment=tiny", *SMALL],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out/tuning.json").read_text())
    by_failure = {trial["failure"].split(":")[0]: trial for trial in record["trials"] if trial["failure"]}
    assert by_failure["out of memory"]["deepspeed"] == trials[0]["deepspeed"]
    assert by_failure["parallel.ep=3 does not divide the data-parallel size 2 (= 2 processes / tp 1 / pp 1)"]["pruned"]
    refused = by_failure["the DeepSpeed configuration has one setting to change"]
    assert refused["pruned"] and "'zero_optimization.reduce_bucket_size' (\"many\")" in refused["failure"]
    ran = {trial["name"]: trial for trial in record["trials"] if not trial["failure"]}
    assert sum(trial["hand_picked"] for trial in ran.values()) >= 12
    best, hand_picked = ran[record["best"]], ran[record["best_hand_picked"]]
    assert best["last_median"] <= hand_picked["last_median"]
    assert hand_picked["median"] == min(trial["median"] for trial in ran.values() if trial["hand_picked"])
    assert json.loads((tmp_path / "out/best.json").read_text()) == best["deepspeed"]
    assert (tmp_path / "out/tuning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parallel
def test_trials_as_jobs_of_their_own(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [each for each in lab.overrides(tmp_path) if not each.startswith(("output_dir", "training."))]
    monkeypatch.setenv("MOME_DIST_CACHE", str(lab.cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    runner = LaunchedRunner(tuple(overrides), nproc=2, steps=2, timeout=120)
    fine = runner.run(Trial(zero_settings(2), {"parallel.ep": "2"}))
    assert fine.failure is None and len(fine.seconds) == 2 and min(fine.seconds) > 0
    assert runner.run(Trial(zero_settings(1, bucket=10**13))).failure == "out of memory"
