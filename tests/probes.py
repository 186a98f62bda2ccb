"""The model and batches that layouts are compared on."""

from __future__ import annotations

from pathlib import Path

from mome_dist.config import load_config
from mome_dist.verification.probe import Probe, shrunk

OVERRIDES = (
    "experiment=tiny",
    "mome.balance_loss=0.1",
    "mome.z_loss=0.01",
    "task.asr_audio_rates=[4]",
    "task.vsr_video_rates=[2]",
    "task.avsr_audio_rates=[16]",
    "task.avsr_video_rates=[5]",
)


def small_probe(folder: Path, steps: int) -> Probe:
    """A small random model that trains on one view of each task; both auxiliary losses weigh in."""
    return Probe(shrunk(load_config([*OVERRIDES]), folder), steps)
