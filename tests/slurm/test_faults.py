"""Jobs that something happens to come back by themselves and end with the loss curve of a run that nothing happened to.

The times go to standard output (``pytest -s``), and as JSON into the file that MOME_DIST_SLURM_TIMES names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mome_dist.files import write_json
from tests.slurm import drills
from tests.slurm.desk import Desk, Job
from tests.slurm.drills import Drill

pytestmark = [pytest.mark.slurm, pytest.mark.parallel, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def unbroken(desk: Desk) -> list[float]:
    """Losses of two processes that nothing happens to."""
    return desk.reference("unbroken", *drills.RUN, world=2, ep=2)


@pytest.fixture(scope="module")
def done(desk: Desk, unbroken: list[float]) -> dict[str, tuple[Job, Drill]]:
    """Each fault, with the job it happened to."""
    done = drills.all_drills(desk)
    happened = [drill for _, drill in done]
    print("\n" + drills.table(happened))
    if "MOME_DIST_SLURM_TIMES" in os.environ:
        write_json(Path(os.environ["MOME_DIST_SLURM_TIMES"]), drills.records(happened))
    return {drill.what: (job, drill) for job, drill in done}


# What happened, the reason in the summary, tries and requeues by Slurm that follow, and how Slurm accounts for the
# start before. A preempted job has saved and requeued itself before Slurm would have.
CASES = [
    (drills.REQUEUED, "requeued", 1, 1, "REQUEUED"),
    (drills.PREEMPTED, "preempted", 1, 1, "REQUEUED"),
    (drills.TIME_LIMIT, "time limit", 1, 1, "REQUEUED"),
    (drills.RANK_KILLED, "rank 1 on node", 1, 0, None),  # again on the same nodes, without the queue
    (drills.CONTROLLER_RESTARTED, None, 0, 0, None),  # nobody notices
    (drills.NODE_KILLED, "node failed", 1, 1, "NODE_FAIL"),
]


@pytest.mark.parametrize(("what", "reason", "tries", "restarts", "state"), CASES, ids=lambda value: str(value)[:20])
def test_a_job_comes_back_by_itself(
    done: dict[str, tuple[Job, Drill]], what: str, reason: str | None, tries: int, restarts: int, state: str | None
) -> None:
    job, drill = done[what]
    assert (drill.tries, drill.restarts) == (tries, restarts)
    reasons = [entry["reason"] for entry in job.summary()["tries"]]
    assert reason is None or any(found.startswith(reason) for found in reasons), reasons
    assert state is None or state in job.accounted(1 + restarts)


@pytest.mark.parametrize("what", [drills.REQUEUED, drills.RANK_KILLED], ids=["wanted", "broken"])
def test_its_loss_curve_is_that_of_an_unbroken_run(
    done: dict[str, tuple[Job, Drill]], unbroken: list[float], what: str
) -> None:
    job, _ = done[what]
    assert job.state == "COMPLETED"
    assert job.losses() == unbroken
    summary = job.summary()
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)
    for entry in summary["tries"]:
        assert entry["last_step"] >= entry["first_step"]
        assert (job.run / f"slurm/{job.id}/try-{entry['number']}/rank-1.log").is_file()
