"""What the log of an unattended training says: standard error is a file here, as it is under Slurm."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mome_dist.config import load_config
from mome_dist.parallel.forked import fork_ranks
from mome_dist.preflight import validate
from mome_dist.training.loop import train
from tests.parallel.runs import Lab


def _train(overrides: list[str], cache: Path) -> int:
    os.environ["MOME_DIST_CACHE"] = str(cache)
    config = load_config(overrides)
    train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return 0


@pytest.mark.parametrize(("interval", "steps"), [("0", [1, 2, 3, 4]), ("60", [1, 4])])
def test_a_log_says_how_far_training_is(tiny_corpus_dir: Path, tmp_path: Path, interval: str, steps: list[int]) -> None:
    lab = Lab.make(tiny_corpus_dir, tmp_path)
    overrides = lab.overrides(tmp_path / "run", "parallel.ep=2", "training.steps=4", f"training.log_seconds={interval}")
    ranks = fork_ranks(_train, 2, overrides, lab.cache, logs=tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0]
    log = (tmp_path / "rank-0.log").read_text()
    assert re.search(r"^encoding train: \d+ of \d+ batches \(100 %\), ", log, re.MULTILINE)
    lines = re.findall(
        r"^training: (\d) of 4 steps \(\d+ %\), loss \d+\.\d{3}(?: over \d steps)?, [\d,]+ tokens/s, "
        r"\d+\.\d\d s waited for data, "
        r"\d:\d\d:\d\d so far(?:, \d:\d\d:\d\d left)?$",
        log,
        re.MULTILINE,
    )
    assert list(map(int, lines)) == steps
    assert "training:" not in (tmp_path / "rank-1.log").read_text()
