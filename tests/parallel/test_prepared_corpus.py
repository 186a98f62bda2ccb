"""A corpus prepared from films of a face is one to train on, as any other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.face_films import write_lrs3
from tests.parallel.runs import Lab

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]


def test_a_prepared_corpus_trains(tmp_path: Path) -> None:
    # In a process of its own: workers are forked from this one, which must not have threads of the face mesh.
    command = [
        sys.executable,
        "tools/prepare_lrs.py",
        "lrs3",
        str(write_lrs3(tmp_path / "lrs3")),
        str(tmp_path / "out"),
        "--geometry=rendered",  # as the lab's encoder expects it
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--workers", "1"], cwd=ROOT, env=environment, check=True, timeout=200)
    lab = Lab.make(tmp_path / "out", tmp_path / "lab")
    small = ["training.steps=2", "training.validate_every=2", "data.batch_size=4", "audio_encoder.padding=clip"]
    losses = lab.train(1, tmp_path / "run", *small, "task.views_per_step=2")
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert "validation" in (tmp_path / "run/metrics.jsonl").read_text()
