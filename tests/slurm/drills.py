"""What can happen to a job on a cluster, done to two jobs while they train; and how long each took to come back.

The controller is restarted while nothing else happens: one that comes back and does not know of a start may start a job
a second time, and Slurm holds it then (`test_held`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tests.slurm.desk import Desk, Job

STEPS = 180
SAVE_EVERY = 5
RUN = [f"training.steps={STEPS}", f"training.save_every={SAVE_EVERY}", "parallel.ep=2"]
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--time=30", "--signal=B:USR1@30"]
_STEPS_BETWEEN = 2 * SAVE_EVERY  # that a job does before the next thing happens to it


@dataclass(frozen=True)
class Drill:
    """One thing that happened to a job.

    Attributes:
        what: it was.
        saved: newest saved step at that moment.
        back_seconds: from then until the job had saved a further step.
        tries, restarts: of the job since then: starts of its ranks, and requeues by Slurm.
    """

    what: str
    job: str
    saved: int
    back_seconds: float
    tries: int
    restarts: int


def drill(job: Job, what: str, act: Callable[[Job], Any]) -> Drill:
    """Let the job train a little, do something to it, and wait until it trains again."""
    job.wait_for_step(job.saved_step() + _STEPS_BETWEEN, 180)
    tries, restarts, saved, began = len(job.summary()["tries"]), job.restarts, job.saved_step(), time.monotonic()
    act(job)
    # What was saved on the way out is no proof of coming back: wait for a further try, then for a further step.
    if what != CONTROLLER_RESTARTED:
        job.wait(lambda: len(job.summary()["tries"]) > tries, 120, f"try after: {what}")
    job.wait_for_step(job.saved_step() + 1, 120)
    seconds = time.monotonic() - began
    return Drill(what, job.id, saved, seconds, len(job.summary()["tries"]) - tries, job.restarts - restarts)


REQUEUED, PREEMPTED, TIME_LIMIT = "scontrol requeue", "preempted by a higher partition", "time limit"
RANK_KILLED, NODE_KILLED, CONTROLLER_RESTARTED = "one rank killed", "one node killed", "controller restarted"


def all_drills(desk: Desk) -> list[tuple[Job, Drill]]:
    """Everything that can happen, each with the job it happened to; both jobs have ended."""
    wanted = desk.submit("wanted", [*OPTIONS, "--nodelist=node[1-2]"], *RUN)
    broken = desk.submit("broken", [*OPTIONS, "--exclude=node[1-2]"], *RUN)
    wanted.wait_for_step(1, 180)
    happened = [(broken, drill(broken, CONTROLLER_RESTARTED, _restart_controller))]
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(_cluster_wants_its_nodes, wanted), pool.submit(_things_break, broken)]
    for job, drills in zip((wanted, broken), (future.result() for future in both), strict=True):
        happened += [(job, entry) for entry in drills]
        job.wait_for_end()
    return happened


def _restart_controller(job: Job) -> None:
    job.desk.cluster.kill_controller()
    time.sleep(2)
    job.desk.cluster.start_controller()


def _cluster_wants_its_nodes(job: Job) -> list[Drill]:
    """An operator requeues the job, a more urgent one displaces it, and the time limit ends it."""
    ask = job.desk.cluster.run

    def urgent(job: Job) -> None:
        ask(["sbatch", "--partition=urgent", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])

    def limit(job: Job) -> None:
        # The controller looks at time limits every 30 s, and warns jobs that long, and their --signal, before the end.
        ask(["scontrol", "update", f"JobId={job.id}", "EndTime=now+60"])
        job.wait(lambda: job.summary()["state"] == "waiting", 100, "end of the time")
        ask(["scontrol", "update", f"JobId={job.id}", "TimeLimit=30"])

    return [
        drill(job, REQUEUED, lambda job: ask(["scontrol", "requeue", job.id])),
        drill(job, PREEMPTED, urgent),
        drill(job, TIME_LIMIT, limit),
    ]


def _things_break(job: Job) -> list[Drill]:
    """The job loses a rank, and then a node."""
    cluster = job.desk.cluster

    def lose_node(job: Job) -> None:
        cluster.kill_node(lost := int(job.nodes()[1].removeprefix("node")))
        job.wait(lambda: job.restarts == 1, 120, "requeue by Slurm")
        cluster.start_node(lost)

    return [drill(job, RANK_KILLED, lambda job: job.kill_rank(job.nodes()[1])), drill(job, NODE_KILLED, lose_node)]


def table(drills: list[Drill]) -> str:
    """The drills in plain text."""
    rows = [f"{'what happened':32} {'saved step':>10} {'training again':>15} {'requeued by Slurm':>18}"]
    rows += [f"{d.what:32} {d.saved:10d} {d.back_seconds:13.1f} s {d.restarts:18d}" for d in drills]
    return "\n".join(rows)


def records(drills: list[Drill]) -> list[dict[str, Any]]:
    """The drills for JSON."""
    return [asdict(entry) for entry in drills]
