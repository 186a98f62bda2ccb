"""What a small run leaves, for the files that test exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_dist.export.adapter import export_adapter
from tests.evaluation_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus_dir: Path) -> Path:
    """A run with a checkpoint of random weights."""
    return make_run(tmp_path_factory.mktemp("run"), tiny_corpus_dir)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change files in it."""
    target = tmp_path_factory.mktemp("exports") / "small"
    export_adapter(run, target)
    return target
