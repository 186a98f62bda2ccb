"""Training jobs where nothing goes wrong: the same losses as in one process, whatever starts them."""

from __future__ import annotations

import pytest

from tests.slurm.desk import Desk

pytestmark = [pytest.mark.slurm, pytest.mark.parallel]

STEPS = 4
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2"]


@pytest.fixture(scope="module")
def one_process(desk: Desk) -> list[float]:
    """Losses of one process."""
    return desk.reference("one", f"training.steps={STEPS}")


def test_sbatch_trains_over_two_nodes_like_one_process(desk: Desk, one_process: list[float]) -> None:
    job = desk.submit("cut", TWO_BY_TWO, "parallel.tp=2", "parallel.pp=2", f"training.steps={STEPS}")
    assert job.wait_for_end() == "COMPLETED", job.output()
    print(job.output(), job.summary())
    assert job.losses() == pytest.approx(one_process, rel=1e-5)
