"""The tuner's search on a runner whose speeds are known, what it takes from failures, and what it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mome_dist.config import load_config
from mome_dist.errors import UserError
from mome_dist.planning.hardware import cluster_of_gpus
from mome_dist.planning.job import Clip, job_of
from mome_dist.planning.llms import find_shape
from mome_dist.tuning.outcome import Outcome, TimedStep
from mome_dist.tuning.report import figure_of, record_of
from mome_dist.tuning.search import Found, tune
from mome_dist.tuning.space import Trial, hand_picked, neighbours, read_trials, refusal, zero_settings
from mome_dist.tuning.trial import _run, explain

BASE = ["experiment=tiny", "data.batch_size=16"]


@dataclass
class Known:
    """ZeRO 2 is fast, overlap helps, and so does one expert-parallel rank; ZeRO 1 with large buckets has no memory."""

    runs: list[str] = field(default_factory=list)

    def run(self, trial: Trial) -> Outcome:
        self.runs.append(trial.name)
        zero = trial.deepspeed["zero_optimization"]
        if zero["stage"] == 1 and zero["reduce_bucket_size"] == 200_000_000:
            return Outcome(failure="out of memory")
        seconds = 1.0 - 0.2 * (zero["stage"] == 2) - 0.1 * zero.get("overlap_comm", False)
        seconds -= 0.3 * (trial.overrides.get("parallel.ep") == "1")
        # The gradients of two ranks, added up where they should be averaged.
        wrong = trial.deepspeed.get("gradient_allreduce_op") == "sum"
        return Outcome(tuple(TimedStep(each, 2.0, 2.0 if wrong else 1.0) for each in (9.0, 9.0, seconds, seconds, 3.0)))


def _tune(runner: Known, most: int = 60, picked: Sequence[Trial] = ()) -> Found | None:
    config = load_config(BASE)
    job = job_of(config, find_shape("llama-3.2-1b"), Clip(), {"audio": 8, "video": 8}, on_gpu=False)
    return tune(
        [*picked, *hand_picked(1)],
        runner,
        lambda trial: None if trial in picked else refusal(trial, BASE, 2, job, None),
        lambda best: neighbours(best, config, 2, job, []),
        rounds=2,
        most=most,
        tell=lambda _: None,
    )


def test_the_search_goes_beyond_the_list_and_survives_failures() -> None:
    runner = Known()
    found = _tune(runner)
    assert found is not None
    assert found.best.trial.stage == 2 and found.best.trial.overrides == {"parallel.ep": "1"}
    assert found.best.trial.deepspeed["zero_optimization"]["overlap_comm"]
    assert found.best_hand_picked is not None
    assert found.best.final_median <= found.best_hand_picked.final_median
    failed = [one for one in found.measured if one.failure]
    assert failed and all(one.failure == "out of memory" for one in failed)
    assert all(runner.runs.count(one.trial.name) == 1 for one in failed), "what failed is not run again"
    assert all(runner.runs.count(one.trial.name) >= 2 for one in found.measured if not one.failure)


def test_the_fastest_is_out_if_it_trains_differently() -> None:
    planted = Trial({**zero_settings(2, overlap=True), "gradient_allreduce_op": "sum"}, {"parallel.ep": "1"})
    found = _tune(Known(), picked=[planted])
    assert found is not None and found.best.trial.name == planted.name.replace(', gradient_allreduce_op="sum"', "")
    wrong = next(one for one in found.measured if one.trial == planted)
    assert wrong.failure == "trains differently: gradient norm 2 instead of 1 in step 1"
    assert wrong.first is not None and wrong.first.seconds == pytest.approx([0.4, 0.4, 3.0])


def test_a_change_of_zero_keeps_the_rest_of_a_users_file() -> None:
    config = load_config(BASE)
    job = job_of(config, find_shape("llama-3.2-1b"), Clip(), {"audio": 8, "video": 8}, on_gpu=False)
    own = Trial({"zero_optimization": {"stage": 1, "allgather_bucket_size": 1000}})
    changed = [trial.deepspeed["zero_optimization"] for trial in neighbours(own, config, 2, job, [])]
    assert {"stage": 0} in changed
    kept = [zero for zero in changed if zero["stage"]]
    assert len(kept) > 3 and all(zero["allgather_bucket_size"] == 1000 for zero in kept)


def test_the_number_of_trials_is_kept() -> None:
    found = _tune(Known(), most=14)
    assert found is not None and len(found.measured) == 14


def test_nothing_runs() -> None:
    class Broken:
        def run(self, trial: Trial) -> Outcome:
            return Outcome(failure="no")

    assert tune(hand_picked(1), Broken(), lambda _: None, lambda _: [], 1, 20, lambda _: None) is None


def test_twelve_different_settings_are_hand_picked() -> None:
    assert len({trial.name for trial in hand_picked(2)}) == len(hand_picked(2)) == 12


def test_what_cannot_work_is_not_run() -> None:
    config = load_config([*BASE, "llm.precision=bf16"])
    job = job_of(config, find_shape("llama-3.1-70b"), Clip(), {"audio": 8, "video": 8}, on_gpu=True)
    settings = zero_settings(1)
    summed = Trial({**settings, "gradient_allreduce_op": "sum", "fp16": {"enabled": True}})
    assert "2 settings to change" in str(refusal(summed, BASE, 2, job, None))
    for overrides, words in (
        ({"parallel.ep": "3"}, "does not divide the data-parallel size"),
        ({"data.accumulation": "3"}, "cannot be cut"),
        ({"mome.nothing": "1"}, "unknown configuration key"),
    ):
        assert words in str(refusal(Trial(settings, overrides), BASE, 2, job, None))
    assert refusal(Trial(settings), BASE, 2, job, None) is None
    assert "would need" in str(refusal(Trial(settings), BASE, 2, job, cluster_of_gpus("h100", 1, 2)))


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "RuntimeError: you tried to allocate: DefaultCPUAllocator: can't allocate memory", "out of memory"),
        (137, "", "out of memory"),
        (124, "launcher: no end after 3 s", "no end in time"),
        (1, "a\nValueError: wrong bucket\nlauncher: logs", "ValueError: wrong bucket"),
        (7, "", "exit code 7"),
    ],
)
def test_failures_are_explained(code: int, text: str, words: str) -> None:
    assert explain(code, text) == words


def test_a_command_without_end_is_ended() -> None:
    code, _ = _run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert code != 0


def test_trials_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    path.write_text(json.dumps([{"deepspeed": zero_settings(2), "overrides": {"data.accumulation": 2}}]))
    assert read_trials(path) == [Trial(zero_settings(2), {"data.accumulation": "2"}, True)]
    path.write_text('{"zero": 1}')
    with pytest.raises(UserError, match="give a JSON list"):
        read_trials(path)


def test_the_report_names_everything_that_was_tried() -> None:
    found = _tune(Known())
    assert found is not None
    record = json.loads(json.dumps(record_of(found), allow_nan=False))
    assert len(record["trials"]) == len(found.measured)
    labels = [label.get_text() for label in figure_of(found).axes[0].get_yticklabels()]
    assert set(labels) == {one.trial.name for one in found.measured}
