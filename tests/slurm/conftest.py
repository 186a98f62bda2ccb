"""One cluster for all tests of this folder. Where it cannot start, they fail and say why; none is skipped."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.parallel.runs import Lab
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.desk import Desk

NODES = 5  # two for each of two jobs, and one for a job whose node failed
_RUNNING = pytest.StashKey[Cluster]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Every test leaves the cluster as it found it; one that does not fails itself, and no other.

    No fixture: its end would not come where a fixture of a whole module fails, and leaves a job behind.
    """
    running = item.config.stash.get(_RUNNING, None)
    left: list[str] = []
    try:
        left = running.tidy() if running else []
    finally:
        result = yield
    assert not left, f"left on the cluster: {'; '.join(left)}"
    return result


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """The running cluster."""
    with cluster(NODES, tmp_path_factory.mktemp("cluster") / "files") as running:
        pytestconfig.stash[_RUNNING] = running
        yield running
        del pytestconfig.stash[_RUNNING]


@pytest.fixture(scope="package")
def desk(slurm: Cluster, tiny_corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A user's desk, with random frozen models: what is tested is the machinery, not what it learns."""
    lab = Lab.make(tiny_corpus_dir, tmp_path_factory.mktemp("lab"))
    return Desk.set_up(slurm, lab, tmp_path_factory.mktemp("desk"))
