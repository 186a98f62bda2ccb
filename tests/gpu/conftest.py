"""The device of the checks, and the figures that they leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mome_dist.files import write_json
from tests.probes import small_probe
from tools.gpu_suite import DEVICE, FIGURES

Record = Callable[..., None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the checks run."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    asked = os.environ.get(DEVICE) or found
    assert asked in ("cuda", "cpu"), f"{DEVICE}={asked}: choose cuda or cpu, or unset it"
    assert asked == found, f"{DEVICE}={asked}, but torch sees {torch.cuda.device_count()} GPUs"
    chosen = os.environ.get("DS_ACCELERATOR", asked)  # forked worlds of other tests say "cpu"
    assert chosen == asked, f"DS_ACCELERATOR={chosen}: run tests/gpu in a process of its own"
    if asked == "cuda":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # references are computed on the CPU
    return torch.device(asked, 0) if asked == "cuda" else torch.device(asked)


@pytest.fixture(scope="session")
def record() -> Record:
    """Called with figures by name, to be kept beside the outcome of the check (`tools/gpu_suite.py`)."""
    figures: dict[str, Any] = {}

    def keep(**more: Any) -> None:
        figures.update(more)
        if place := os.environ.get(FIGURES):
            write_json(Path(place), figures)

    return keep


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small random model and batches of three views."""
    return small_probe(tmp_path_factory.mktemp("llama"), steps=3)
