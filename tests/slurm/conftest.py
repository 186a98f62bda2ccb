"""One cluster for all tests of this folder. Where it cannot start, they fail and say why; none is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.runs import Lab
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.desk import Desk

NODES = 5  # two for each of two jobs, and one for a job whose node failed


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster."""
    with cluster(NODES, tmp_path_factory.mktemp("cluster") / "files") as running:
        yield running


@pytest.fixture(scope="package")
def desk(slurm: Cluster, tiny_corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A user's desk, with random frozen models: what is tested is the machinery, not what it learns."""
    lab = Lab.make(tiny_corpus_dir, tmp_path_factory.mktemp("lab"))
    return Desk.set_up(slurm, lab, tmp_path_factory.mktemp("desk"))
