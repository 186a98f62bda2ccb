"""A job that Slurm holds says why, and which command lets it come back."""

from __future__ import annotations

import shlex

import pytest

from tests.slurm.desk import Desk
from tests.slurm.settings import STATE

pytestmark = [pytest.mark.slurm, pytest.mark.parallel, pytest.mark.timeout(480)]


def test_a_job_that_was_started_twice_is_held_says_so_and_can_be_released(desk: Desk) -> None:
    ask, state, nodes = desk.cluster.run, STATE / "controller/job_state", (1, 2)
    two = ["--nodes=2", "--ntasks-per-node=1", "--nodelist=node[1-2]"]
    later = ["--begin=now+1hour", "--job-name=started-twice"]
    job = desk.submit("held", [*two, *later], "parallel.ep=2", "training.steps=2000", "training.save_every=5")
    saved = ["grep", "-q", "started-twice", str(state)]
    job.wait(lambda: ask(saved, check=False).returncode == 0, 30, "word of the job in the controller's state")
    ask(["cp", str(state), f"{STATE}/kept"])
    start = ["scontrol", "update", f"JobId={job.id}", "StartTime=now"]
    ask(start)
    job.wait_for_step(5)

    # The controller comes back and does not know that it has started the job, and the nodes are too busy to tell.
    desk.cluster.kill_controller()
    for node in nodes:
        ask(["pkill", "-STOP", "slurmstepd"], node=node)
    ask(["cp", f"{STATE}/kept", str(state)])
    desk.cluster.start_controller()
    ask(start)
    job.wait(lambda: job.show()["Reason"] == "launch_failed_requeued_held", 60, "hold")
    for node in nodes:
        ask(["pkill", "-CONT", "slurmstepd"], node=node)

    job.wait(lambda: job.summary()["held"], 60, "word of the hold")
    summary = job.summary()
    assert (summary["state"], summary["held"]) == ("waiting", "launch_failed_requeued_held")
    # It is written down first, and said then.
    said = f"held by Slurm (launch_failed_requeued_held) until `{summary['release']}`"
    job.wait(lambda: said in job.output(), 30, "the same in the job's output")
    assert desk.cluster.resume_nodes(), "Slurm drains a node that runs a job it does not know"
    ask(shlex.split(summary["release"]))
    job.wait(lambda: len(job.summary()["tries"]) == 2, 120, "second try")
    assert job.summary()["held"] is None
    ask(["scancel", job.id])
    assert job.wait_for_end(60) == "CANCELLED"
