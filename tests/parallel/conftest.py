"""Fixtures of the parallel tests."""

from __future__ import annotations

import pytest

from mome_dist.config import load_config
from mome_dist.verification.probe import Probe, shrunk
from mome_dist.verification.verify import Verifier


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """Verifies layouts on a small random model that trains on one view of each task; both auxiliary losses weigh in."""
    overrides = [
        "experiment=tiny",
        "mome.balance_loss=0.1",
        "mome.z_loss=0.01",
        "task.asr_audio_rates=[4]",
        "task.vsr_video_rates=[2]",
        "task.avsr_audio_rates=[16]",
        "task.avsr_video_rates=[5]",
    ]
    return Verifier(Probe(shrunk(load_config(overrides), tmp_path_factory.mktemp("llama")), steps=3))
