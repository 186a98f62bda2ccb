"""Results of an evaluation do not depend on the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mome_dist import evaluate
from mome_dist.evaluation.activations import Activations
from tests.evaluation_run import make_run
from tests.parallel.worlds import run_world

COSTS = ("tokens_per_second", "real_time_factor", "decode_seconds", "encode_seconds", "peak_memory_bytes")


def run_command(arguments: list[str]) -> int:
    return evaluate.main(arguments)


def outcome(directory: Path) -> dict[str, Any]:
    results = json.loads((directory / "results.json").read_text())
    assert results.pop("processes") in (1, 2, 3)
    for view in results["views"]:
        for key in COSTS:
            view.pop(key)
    activations = Activations.load(directory / "activations.safetensors")
    texts = {name: (directory / f"{name}.jsonl").read_text() for name in ("hypotheses", "noise")}
    return {"results": results, "activations": activations.counts.tolist(), **texts}


@pytest.mark.parallel
def test_any_number_of_processes_gives_the_same_results(tmp_path: Path, tiny_corpus_dir: Path) -> None:
    run = make_run(tmp_path, tiny_corpus_dir)
    outcomes = []
    for world in (1, 2, 3):  # the split's 10 utterances make 4 batches of 3: ranks get unequal shares
        out = tmp_path / f"world-{world}"
        arguments = [f"checkpoint={run}", f"output={out}", "split=train", "limit=10", "baselines=[chance,untrained]"]
        arguments += ["noise=[clean,babble]", "snr=[0]", "video_corruption=[none,blur]"]
        assert run_world(run_command, world, arguments) == [0] * world
        outcomes.append(outcome(out))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    views = outcomes[0]["results"]["views"]
    # Three views hear, three see, and one does both.
    assert [len([view for view in views if view["task"] == task]) for task in ("asr", "vsr", "avsr")] == [4, 4, 4]
    assert outcomes[0]["noise"].count("\n") == 10
