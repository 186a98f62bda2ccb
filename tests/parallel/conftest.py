"""Fixtures of the parallel tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome_dist.verification.verify import Verifier
from tests.parallel.runs import Lab
from tests.probes import small_probe


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """Verifies layouts on a small random model that trains on one view of each task; both auxiliary losses weigh in."""
    return Verifier(small_probe(tmp_path_factory.mktemp("llama"), steps=3))


@pytest.fixture(scope="session")
def lab(tiny_corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Small frozen models and the tiny corpus; features that one file has encoded, the next one finds.

    Do not change files in it: `Lab.make` makes another one.
    """
    return Lab.make(tiny_corpus_dir, tmp_path_factory.mktemp("lab"))
