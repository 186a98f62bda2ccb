"""The cluster check in a world of two nodes: each rank is told its node as Slurm tells it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mome_dist.cluster.check import Limits, check_cluster
from mome_dist.files import write_json
from mome_dist.planning.hardware import measured_cluster
from tests.parallel.worlds import run_world

pytestmark = pytest.mark.parallel
# Two processes share a core here, while tests of others may run: slowness is no fault.
PATIENT = Limits(clock=1.0, link=0.0, rate=0.0)


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core without bf16 takes a second for each product of the usual size."""
    monkeypatch.setattr("mome_dist.cluster.rates.CPU_SIDE", 256)


def _check(shared: Path, stray: Path | None) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2}"
    # Node 1 sees another folder if it is told so.
    folder = stray if stray is not None and rank >= 2 else shared
    return check_cluster(folder, PATIENT, 60, lambda _: None)


def test_two_nodes(tmp_path: Path) -> None:
    records = run_world(_check, 4, tmp_path, None)
    record = records[0]
    assert (record["nodes"], record["ranks_per_node"], record["device"]) == (2, 2, "cpu")
    assert record["problems"] == []
    assert all(other["links"] == record["links"] for other in records)
    inside, between = record["links"]["inside"], record["links"]["between"]
    assert sorted(pair["ranks"] for pair in inside["pairs"]) == [[0, 1], [2, 3]]
    assert [pair["ranks"] for pair in between["pairs"]] == [[0, 2]]
    for speed in (inside, between, *inside["pairs"], *between["pairs"]):
        assert 1e6 < speed["bytes_per_second"] < 1e12 and 1e-6 < speed["latency"] < 1
    # All ranks have one clock.
    assert all(abs(report["clock_seconds"]) < 0.1 for report in record["ranks"])
    assert not list(tmp_path.iterdir()), "the token is gone"
    write_json(tmp_path / "cluster.json", record)
    cluster = measured_cluster(tmp_path / "cluster.json")
    assert cluster.ranks == 4 and cluster.between.bytes_per_second == between["bytes_per_second"]


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mome_dist.cluster.check.SHARED_WAIT_SECONDS", 0.5)
    other = tmp_path / "other"
    other.mkdir()
    record = run_world(_check, 4, tmp_path, other)[0]
    assert len(record["problems"]) == 1 and record["problems"][0].startswith("node node1 does not see a file")
