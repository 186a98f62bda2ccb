"""The fault drill survives every fault, and fails when something is really lost."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mome_dist.drills.bench import Bench
from mome_dist.drills.cases import FAULTS, Case, Start, all_cases
from mome_dist.drills.command import drill_command
from mome_dist.drills.verdict import Curve, run_case, unbroken
from mome_dist.errors import UserError
from tests.parallel.runs import Lab, lines

ROOT = Path(__file__).resolve().parents[2]
# Met by a run of low-rank terms, the others by one of experts: what a fault meets of a run is mostly the same.
TERMS = ("kill-two", "half", "corrupted-shard", "corrupted-shard-left-out", "damaged-checkpoint", "torn-metrics")
PLAN = ("training.steps=6", "training.save_every=2")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(["experiment=tiny"], 2, tmp_path_factory.mktemp("drill"), shrink=True)


@pytest.fixture(scope="module")
def without_experts(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Low-rank terms of the LLM and of the encoder, which a step encodes with: no cache holds its features."""
    method = ["experiment=tiny", "method=omni_avsr/st"]
    return Bench.make(method, 2, tmp_path_factory.mktemp("drill of terms"), shrink=True)


@pytest.fixture(scope="module")
def reference(bench: Bench) -> Curve:
    return _unbroken(bench)


@pytest.fixture(scope="module")
def reference_without_experts(without_experts: Bench) -> Curve:
    return _unbroken(without_experts)


def _unbroken(bench: Bench) -> Curve:
    return unbroken(bench, PLAN, bench.folder / "runs" / "unbroken", bench.folder / "cache")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in TERMS])
def test_a_run_survives(bench: Bench, reference: Curve, fault: str) -> None:
    _survives(bench, reference, fault)


@pytest.mark.parametrize("fault", TERMS)
def test_a_run_without_experts_survives(without_experts: Bench, reference_without_experts: Curve, fault: str) -> None:
    _survives(without_experts, reference_without_experts, fault)


def _survives(bench: Bench, reference: Curve, fault: str) -> None:
    result = run_case(bench, all_cases(bench, kills=4, seed=0)[fault](), reference)
    assert result.problems == []
    assert (result.lost, result.repeated) == (0, 0)


def test_a_drill_of_a_run_without_experts_sets_none_of_their_keys(bench: Bench, tmp_path: Path) -> None:
    without = Bench.make(["experiment=tiny", "mome=none"], 2, tmp_path, shrink=False)
    assert without.config().mome.experts == 0 and bench.config().mome.capacity_factor is None


def test_every_fault_is_described(bench: Bench) -> None:
    assert list(all_cases(bench, 1, 0)) == list(FAULTS)


def test_the_drill_sees_another_curve_and_other_samples(bench: Bench, reference: Curve) -> None:
    # A run with another seed stands for one that lost its place.
    changed = run_case(bench, Case("another order", (Start(),), ("seed=1",)), reference)
    assert any("losses differ" in problem for problem in changed.problems)
    assert changed.lost > 0 and changed.repeated > 0


def test_the_drill_sees_what_did_not_happen(bench: Bench, reference: Curve) -> None:
    quiet = run_case(bench, Case("nothing happens", (Start(codes=(75,), says="asked to stop"),)), reference)
    assert "start 1 ended with 0, not 75" in quiet.problems[0]


def test_an_unknown_fault_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(overrides=["experiment=tiny"], nproc=1, shrink=False, only=[], kills=1, seed=0)
    with pytest.raises(UserError, match="--nproc is 1"):
        drill_command(options, tmp_path)


@pytest.mark.timeout(500)
def test_real_processes_are_started_again_by_the_launcher(lab: Lab, tmp_path: Path) -> None:
    overrides = ("training.steps=16", "training.save_every=3", "training.log_utterances=true", "task=vsr")
    expected = lab.train(2, tmp_path / "unbroken", *overrides, ep=2)
    arguments = lab.overrides(tmp_path / "broken", "parallel.ep=2", *overrides)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launchers.local", "--nproc", "2", "--restarts", "2", *arguments],
        cwd=ROOT,
        env={**os.environ, "MOME_DIST_CACHE": str(lab.cache)},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.01)
    os.kill(_rank_of(launcher.pid, 1), signal.SIGKILL)
    _, told = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, told
    assert "rank 1 failed first, with exit code 137 (signal 9); starting again, restart 1 of 2" in told
    assert "resumed after step" in told and "s after the failure" in " ".join(told.split())
    records = [line for line in lines(metrics) if "loss" in line]
    assert [line["loss"] for line in records] == expected
    assert [line["utterances"] for line in records] == [
        line["utterances"] for line in lines(tmp_path / "unbroken" / "metrics.jsonl") if "loss" in line
    ]


def _rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank, found among the launcher's children by its environment."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK", b""):
            return int(child)
    raise AssertionError("no such rank")


def test_half_a_line_of_metrics_is_dropped_and_damage_is_not(tmp_path: Path) -> None:
    from mome_dist.training.metrics import keep_until

    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(whole) + '\n{"step": 4, "lo')
    keep_until(path, 2)
    assert path.read_text().splitlines() == whole[:2]
    path.write_text("\n".join([whole[0], "half a li", whole[1]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is no record"):
        keep_until(path, 2)
    assert "half a li" in path.read_text()
