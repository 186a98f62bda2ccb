"""The documentation's commands for a cluster, where nothing goes wrong: they train as one process does."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from mome_dist.launchers.slurm import tries
from tests.parallel.runs import lines
from tests.slurm import readme
from tests.slurm.desk import Desk, Job

pytestmark = [pytest.mark.slurm, pytest.mark.parallel, pytest.mark.timeout(480)]

STEPS = "training.steps=4"
SPREAD = ["parallel.tp=2", "parallel.ep=2", STEPS]
# Without experts: low-rank terms of the LLM and of the video encoder, one drawn pair of rates for all tasks of a step.
OMNI = ["method=omni_avsr/st", "task.views_per_step=null", "training.steps=24", "training.save_every=4"]
CUT = [*OMNI, "parallel.tp=2", "parallel.pp=2"]


def test_every_documented_command_is_run_here() -> None:
    assert len(readme.documented_commands()) == len(readme.ALL)
    for start in readme.ALL:
        assert readme.command(start)


@pytest.fixture(scope="module")
def one_process(desk: Desk) -> list[float]:
    """Losses of one process."""
    return desk.reference("one", STEPS)


def start(desk: Desk, name: str, command: list[str], *more: str) -> Job:
    """Run a documented command that submits one training."""
    told = desk.run([*command, *desk.small(name, *more)]).stdout
    found = re.search(r"job (\d+)", told)
    assert found, told
    return Job(desk, found[1], desk.folder / "runs" / name)


@pytest.fixture(scope="module")
def started(desk: Desk) -> dict[str, Job]:
    """The same training by sbatch, launchers.slurm and launchers.submitit side by side, two on the same nodes."""
    together = "launcher.extra=['--nodelist=node[1-2]']"
    train = readme.command(readme.TRAIN)
    train[1:1] = ["--nodelist=node[1-2]", "--cpus-per-task=3"]
    jobs = {
        "sbatch": start(desk, "sbatch", train, *CUT),
        "slurm": start(desk, "slurm", [*readme.command(readme.SLURM), together], *SPREAD),
        "submitit": start(desk, "submitit", readme.command(readme.SUBMITIT), *SPREAD),
    }
    jobs["sbatch"].wait_for_step(4, 240)
    desk.cluster.run(["scontrol", "requeue", jobs["sbatch"].id])
    for job in jobs.values():
        job.wait_for_end(240)
    return jobs


@pytest.mark.parametrize("name", ["slurm", "submitit"])
def test_two_nodes_train_like_one_process(started: dict[str, Job], one_process: list[float], name: str) -> None:
    job = started[name]
    assert job.state == "COMPLETED", job.output()
    assert job.losses() == pytest.approx(one_process, rel=1e-5)
    assert job.accounted() == ["COMPLETED"]
    summary = job.summary()
    assert (summary["state"], summary["exit_code"], summary["tries"][0]["reason"]) == ("finished", 0, "finished")
    assert (summary["tries"][0]["first_step"], summary["tries"][0]["last_step"]) == (0, 4)


def test_a_run_without_experts_is_requeued_goes_on_and_is_reported(started: dict[str, Job], desk: Desk) -> None:
    """Two ranks hold slices of its low-rank terms, two stages its layers; the first of them trains the encoder."""
    job, unbroken = started["sbatch"], desk.reference("unbroken-omni", *OMNI, world=4, tp=2, pp=2)
    assert job.state == "COMPLETED", job.output()
    assert job.losses() == unbroken and len(unbroken) == 24
    assert job.restarts == 1 and job.accounted(2) == ["REQUEUED", "COMPLETED"]
    first, second = job.summary()["tries"]
    assert first["reason"].startswith("requeued") and 4 <= second["first_step"] < 24 and second["reason"] == "finished"
    desk.run(["python", "-m", "mome_dist.report", "run=runs/sbatch"], timeout=120)
    page = (job.run / "report/report.md").read_text()
    assert "| MoME | none |" in page and "Expert load" not in page
    assert (job.run / "report/lora.png").is_file()


def test_experts_are_spread_over_both_nodes(started: dict[str, Job]) -> None:
    job = started["slurm"]
    log = (job.run / f"slurm/{job.id}/try-1/rank-0.log").read_text()
    # Ranks 0 and 1 on one node, 2 and 3 on the other: expert-parallel pairs are 0, 2 and 1, 3.
    assert "4 processes = tp 2 x pp 1 x dp 2 (ep 2)" in " ".join(log.split())


def test_submitit_knows_that_its_job_has_succeeded(started: dict[str, Job], desk: Desk) -> None:
    job = started["submitit"]
    ask = f"import submitit; job = submitit.SlurmJob('runs/submitit', '{job.id}', tasks=[0, 1, 2, 3])"
    assert (
        desk.run(["python", "-c", f"{ask}; print(job.results(), job.state)"]).stdout.strip()
        == "[None, None, None, None] COMPLETED"
    )


def test_a_run_is_evaluated_on_a_node(started: dict[str, Job], desk: Desk) -> None:
    command = [word.replace("runs/lrs3", "runs/sbatch") for word in readme.command(readme.EVALUATE)]
    found = re.search(r"job (\d+)", desk.run([*command, "limit=2", "max_new_tokens=4"]).stdout)
    assert found
    job = Job(desk, found[1], desk.folder / "runs/sbatch")
    assert job.wait_for_end(120) == "COMPLETED", job.output()
    assert "avsr" in json.dumps(json.loads((job.run / "evaluation/results.json").read_text()))
    assert job.summary()["module"] == "mome_dist.evaluate"


def test_submitit_saves_when_it_is_warned_and_comes_back(desk: Desk) -> None:
    run = ["parallel.ep=2", "training.steps=60", "training.save_every=50"]
    unbroken = desk.reference("unbroken-60", *run, world=2, ep=2)
    command = readme.command(readme.SUBMITIT, ranks=1)
    job = start(desk, "warned", command, *run)
    job.wait(lambda: len(job.steps()) >= 5, 90, "step")
    desk.cluster.run(["scancel", "--signal=USR2", job.id])  # as Slurm sends it ahead of a time limit or a preemption
    job.wait(lambda: len(job.summary()["tries"]) == 2, 90, "second try")
    saved = job.saved_step()
    assert 5 <= saved < 50, "it has saved at the warning, and only then"
    job.wait(lambda: len(job.steps()) > saved, 90, "further step")
    job.kill_rank(job.nodes()[1])
    assert job.wait_for_end(180) == "COMPLETED", job.output()
    assert job.losses() == unbroken
    reasons = [entry["reason"] for entry in job.summary()["tries"]]
    assert len(reasons) == 3 and reasons[0] == tries.ASKED and reasons[2] == tries.FINISHED, reasons
    assert job.restarts == 2 and job.accounted(3) == ["REQUEUED", "REQUEUED", "COMPLETED"]


def test_a_sweep_is_a_job_array(desk: Desk) -> None:
    command = [*readme.command(readme.SWEEP, ranks=1), *desk.small("sweep", STEPS)]
    command = [word for word in command if not word.startswith("output_dir=")]
    shown = desk.run(_dry(command)).stdout
    assert shown.count("python -m mome_dist.train") == 4
    told = desk.run(command, timeout=280).stdout
    rows = [row for row in told.splitlines() if ": loss " in row]
    assert len(rows) == 4 and "seed=1" in rows[3], told
    ends = {}
    for row in rows:
        losses = [line["loss"] for line in lines(desk.folder / row.split()[0] / "metrics.jsonl") if "loss" in line]
        assert len(losses) == 4 and f": loss {sum(losses[-2:]) / 2:.4f} (mean of the last 2 steps)" in row
        ends[row.split()[0]] = losses[-1]
    assert len(set(ends.values())) == 4, "the jobs of the array trained the same"
    tasks = desk.run(["sacct", "-X", "-n", "-P", "--format=JobID", "--name=mome-sweep"]).stdout.split()
    (array,) = {task.partition("_")[0] for task in tasks}
    assert Job(desk, array, desk.folder).accounted(4) == ["COMPLETED"] * 4


def test_a_dry_run_prints_what_would_run_and_runs_nothing(desk: Desk) -> None:
    before = desk.run(["squeue", "-h", "-o", "%i"]).stdout
    awkward = "data.features_dir='say; rm -rf \"$HOME\"'"
    more = desk.small("dry", awkward)
    slurm, submitit = (_dry(readme.command(start)) for start in (readme.SLURM, readme.SUBMITIT))
    words = shlex.split(desk.run([*slurm, *more]).stdout)
    assert words[words.index("sbatch") + 1 : words.index("slurm/train.sh")] == [
        *("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3", "--signal=B:USR1@120")
    ]
    assert words[words.index("slurm/train.sh") + 1 :] == ["experiment=lrs3", *more]
    told = desk.run([*submitit, *more]).stdout
    assert "tasks_per_node: 2" in told and shlex.split(told.splitlines()[-1])[1:3] == ["-m", "mome_dist.train"]
    assert desk.run(["squeue", "-h", "-o", "%i"]).stdout == before
    assert not (desk.folder / "runs/dry").exists()


def _dry(command: list[str]) -> list[str]:
    """A command with the launcher's option before what it launches."""
    return [*command[:5], "--dry-run", *command[5:]]
