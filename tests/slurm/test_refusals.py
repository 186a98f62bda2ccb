"""Jobs that should not run, or not go on: each ends soon, says why, and leaves nothing behind."""

from __future__ import annotations

import json
import time

import pytest

from tests.patience import patience
from tests.slurm.desk import Desk

pytestmark = [pytest.mark.slurm, pytest.mark.parallel]

TWO = ["--nodes=2", "--ntasks-per-node=1"]
LONG = ["parallel.ep=2", "training.steps=2000", "training.save_every=5"]


def test_a_layout_that_does_not_fit_the_allocation_ends_in_seconds(desk: Desk) -> None:
    began = time.monotonic()
    job = desk.submit("misfit", TWO, "parallel.tp=4")
    assert job.wait_for_end(20) == "FAILED"
    assert time.monotonic() - began < patience(10)
    assert "parallel.tp=4 x parallel.pp=1 = 4 does not divide the 2 started processes" in job.output()
    assert "The allocation has 2 nodes x 1 ranks" in job.output()
    assert not job.run.exists()
    assert job.accounted() == ["FAILED"]


@pytest.mark.parametrize("launcher", ["slurm", "submitit"])
def test_the_login_node_refuses_it_before_the_queue(desk: Desk, launcher: str) -> None:
    command = ["python", "-m", f"launchers.{launcher}", "experiment=lrs3", *desk.small("misfit", "parallel.tp=4")]
    done = desk.run([*command, "launcher.nodes=2"], check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "launcher.nodes=2 x launcher.tasks_per_node=1 are 2 processes" in done.stderr
    unknown = desk.run([*command, "launcher.nods=2"], check=False)
    assert unknown.returncode == 2 and "'launcher.nods'" in unknown.stderr


def test_gpus_without_cores_for_their_ranks_are_refused(desk: Desk) -> None:
    job = desk.submit("cores", ["--nodes=1", "--gpus-per-node=2"])
    assert job.wait_for_end(20) == "FAILED"
    assert "2 cores on a node for 2 ranks of 2: add --ntasks-per-node=2" in job.output()


def test_a_node_that_does_not_share_the_output_directory_is_named(desk: Desk) -> None:
    (desk.folder / "runs/unshared").mkdir(parents=True)
    hide = ["mount", "-t", "tmpfs", "tmpfs", str(desk.folder / "runs/unshared")]
    desk.cluster.run(hide, node=2)
    try:
        job = desk.submit("unshared", [*TWO, "--nodelist=node[1-2]"], "parallel.ep=2")
        assert job.wait_for_end(30) == "FAILED"
        assert f"node node2 cannot share the output directory {job.run}: No such file" in job.output()
    finally:
        desk.cluster.run(["umount", hide[-1]], node=2)


@pytest.mark.timeout(480)
def test_of_two_jobs_of_one_run_the_second_is_refused_and_a_requeue_takes_over(desk: Desk) -> None:
    few = ["parallel.ep=2", "training.steps=40", "training.save_every=5"]
    job = desk.submit("shared", [*TWO, "--nodelist=node[1-2]"], *few)
    job.wait_for_step(5, 300)

    def refused() -> str:
        """Submit another job of this run; return what it says of the first job's state."""
        second = desk.submit("shared", [*TWO, "--nodelist=node[3-4]"], *few)
        assert second.wait_for_end() == "FAILED"
        [line] = [text for text in second.output().splitlines() if text.startswith("error: ")]
        assert line.startswith(f"error: {job.run} belongs to job {job.id} (process ")
        assert f". Wait for its end, stop it with `scancel {job.id}`, or choose another output_dir." in line
        assert not (job.run / "slurm" / second.id).exists()
        return line.partition("; the job is ")[2].partition(".")[0]

    assert refused() == "running"
    desk.cluster.run(["scontrol", "requeue", job.id])
    job.wait(lambda: job.restarts == 1 and job.state == "PENDING", 60, "requeue")
    assert refused() in ("pending", "configuring", "running"), "nobody takes its place while it waits"
    assert job.wait_for_end(400) == "COMPLETED"
    assert len(job.losses()) == 40, "the first job was disturbed"
    [record] = (job.run / ".owner").glob("*.json")
    owner = json.loads(record.read_text())
    assert (record.name, owner["job"], owner["restart"], owner["released"]) == ("2.json", job.id, 1, True)
    assert not list(job.run.glob("checkpoints/.*"))


def test_a_cancelled_job_ends_cleanly(desk: Desk) -> None:
    job = desk.submit("cancelled", [*TWO, "--nodelist=node[1-2]"], *LONG)
    job.wait_for_step(5)
    desk.cluster.run(["scancel", job.id])
    assert job.wait_for_end(60) == "CANCELLED"
    job.wait(lambda: job.summary()["state"] == "cancelled", 40, "record of the cancellation")
    assert job.restarts == 0 and job.accounted() == ["CANCELLED"]
    job.wait(lambda: not desk.processes(1) + desk.processes(2), 40, "end of all processes")
    assert not list(job.run.glob("checkpoints/.*")), "something half written was left"


def test_a_job_that_always_fails_gives_up(desk: Desk) -> None:
    job = desk.submit("doomed", [*TWO, "--nodelist=node[1-2]", "--export=ALL,MAX_TRIES=2"], *LONG)
    for number in (1, 2):
        log = job.run / f"slurm/{job.id}/try-{number}/rank-1.log"
        job.wait(log.exists, 40, f"try {number}")
        job.wait(lambda: desk.processes(2), 20, "rank")
        job.kill_rank("node2")
    assert job.wait_for_end(60) == "FAILED"
    assert "2 tries in a row without a further checkpoint (MAX_TRIES=2): giving up" in job.output()
    summary = job.summary()
    assert summary["state"] == "failed" and summary["exit_code"] > 128
    assert [entry["reason"] for entry in summary["tries"]] == ["rank 1 on node2: Killed"] * 2
