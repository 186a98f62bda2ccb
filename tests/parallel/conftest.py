"""Fixtures of the parallel tests."""

from __future__ import annotations

import pytest

from mome_dist.verification.verify import Verifier
from tests.probes import small_probe


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """Verifies layouts on a small random model that trains on one view of each task; both auxiliary losses weigh in."""
    return Verifier(small_probe(tmp_path_factory.mktemp("llama"), steps=3))
