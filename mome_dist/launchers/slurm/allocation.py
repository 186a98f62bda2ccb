"""What a job does on the first node of its allocation: start all ranks, watch over them, start again.

    python -m mome_dist.launchers.slurm.allocation [--module mome_dist.train] [launcher.srun=[...]] key=value ...

The scripts in ``slurm/`` become this process, so that Slurm's warning (``#SBATCH --signal=B:USR1@120``) arrives here.
It is passed on to the ranks, which save and end with code 75. Then:

- time limit, preemption: the job is requeued and continues from its newest checkpoint;
- a rank crashed or was lost: all ranks start again in this allocation if its nodes are well, else the job is requeued;
- a node failed: Slurm itself requeues the job, and the next start notes it;
- cancelled, or a mistake of the user: the job ends.

A job that failed MAX_TRIES times in a row (3) without a further checkpoint ends with the code of its ranks. Everything
is in ``RUN/slurm/JOB/``: ``try-N/rank-N.log``, and ``summary.json`` with the reason of every try.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

from mome_dist import exit_codes
from mome_dist.cli import Parser, main_guard
from mome_dist.config import load_group
from mome_dist.errors import UserError
from mome_dist.launchers.options import DEFAULT_MODULE, PREFIX, SlurmOptions, check_container, cores_of_rank
from mome_dist.launchers.slurm import commands, tries
from mome_dist.launchers.slurm.job import Job, job_port
from mome_dist.launchers.slurm.preflight import NodesError, check_nodes
from mome_dist.launchers.slurm.steps import Steps
from mome_dist.launchers.slurm.tries import Record, run_directory, saved_steps
from mome_dist.ownership import TOKEN, owned
from mome_dist.preflight import validate_overrides

_POLL_SECONDS = 0.2
_RESERVE_SECONDS = 10.0  # before the end of the allocation, for the requeue itself
_STOP_SECONDS = 600.0  # how long ranks may take to save when nothing else ends first
STEP_KEYS = ("launcher.srun", "launcher.container")  # that act on the ranks of a job, not on its allocation
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# srun: error: node2: task 1: Killed       srun: error: node1: tasks 0-1: Exited with exit code 2
_TASK_ENDED = re.compile(r"srun: error: (\S+): task(s? (\d+)[\d,-]*): (.*)")
_EXIT_CODE = re.compile(r"exit code (\d+)")
_NODE_ENDED = re.compile(r"srun: error: (Node failure on \S+)")


@dataclass(frozen=True)
class End:
    """How the ranks of one try ended.

    Attributes:
        code: exit code of the first rank to fail.
        complaint: srun's first word about it.
        rank: that this is about, 0 where it is about none.
        told: whether the ranks were asked to stop.
        node_lost: whether srun lost a node.
    """

    code: int
    complaint: str
    rank: int
    told: bool
    node_lost: bool


class Allocation:
    """This job, and the ranks that it runs now."""

    def __init__(
        self, job: Job, run: Path, module: str, arguments: Sequence[str], max_tries: int, steps: Steps
    ) -> None:
        self.job, self.run, self.module, self.arguments, self.steps = job, run, module, list(arguments), steps
        self.folder = run / "slurm" / job.id
        self.record = Record.open(self.folder, job.id, module, self.arguments)
        self._max_tries, self._told = max_tries, False
        self._failed_at: float | None = None  # of the last try in this allocation, seconds since 1970
        for number in _STOP_SIGNALS:
            signal.signal(number, self._note)

    def work(self) -> int:
        """Try until the work is done, has failed for good, or waits in the queue; return the exit code."""
        self.record.close_unfinished(commands.earlier_ends(self.job.id), self._steps())
        while True:
            if self._given_up():
                return self.record.tries[-1].exit_code or 1
            try:
                check_nodes(self.job.nodes, self.job.tasks_per_node, self.run, self.steps)
            except NodesError as error:
                say(f"{error}; asking for other nodes")
                self.record.begin(self.job.nodes, self._steps())
                return self._requeue(tries.NODES_AWAY, None, commands.show_job(self.job.id))
            code = self._one_try()
            if code is not None:
                return code

    def _one_try(self) -> int | None:
        """Run all ranks once; None means: again, here."""
        entry = self.record.begin(self.job.nodes, self._steps())
        logs = self.folder / f"try-{entry.number}"
        logs.mkdir(parents=True, exist_ok=True)
        say(f"try {entry.number}: {self.job.world_size} ranks on {' '.join(self.job.nodes)}; logs: {logs}/rank-N.log")
        # A warning during the look at the nodes leaves nothing to start.
        end = End(exit_codes.PREEMPTED, "", 0, True, False) if self._told else self._run_ranks(logs)
        if end.code == 0:
            return self._finish(tries.FINISHED, 0, "finished")
        known = commands.show_job(self.job.id)
        state = known.get("JobState", "")
        if state == "CANCELLED":
            return self._finish(tries.CANCELLED, end.code, "cancelled")
        if end.told or end.node_lost or end.code == exit_codes.PREEMPTED:
            return self._after_stop(end, known)
        if end.code == exit_codes.USER_ERROR:
            tell_log(logs / "rank-0.log")
            return self._finish("the configuration is wrong", end.code, "failed")
        say(f"try {entry.number}: {end.complaint}")
        tell_log(logs / f"rank-{end.rank}.log")
        self.record.end(end.complaint, end.code, self._steps(), "running")
        self._failed_at = time.time()
        return None

    def _after_stop(self, end: End, known: dict[str, str]) -> int:
        """The ranks were asked to stop, or a node is gone: come back later, unless that is arranged already."""
        reason = tries.NODE_LOST if end.node_lost else tries.why_stopped(known)
        if known.get("JobState") != "RUNNING":
            return self._finish(reason, end.code, "waiting", known)
        return self._requeue(reason, end.code, known)

    def _requeue(self, reason: str, code: int | None, known: dict[str, str]) -> int:
        self.record.end(reason, code, self._steps(), "waiting", known)
        if self._given_up():
            return code or 1
        say(f"{reason}: back into the queue, to continue after step {self._steps() or 0}")
        if self.record.held:
            say(self.record.table())
        commands.requeue(self.job.id)
        return exit_codes.PREEMPTED

    def _finish(self, reason: str, code: int, state: str, known: dict[str, str] | None = None) -> int:
        self.record.end(reason, code, self._steps(), state, known)
        say(self.record.table())
        return code

    def _given_up(self) -> bool:
        failures = self.record.failures_without_progress()
        if failures < self._max_tries:
            return False
        self.record.fail(self.record.tries[-1].exit_code or 1)
        say(f"{failures} tries in a row without a further checkpoint (MAX_TRIES={self._max_tries}): giving up")
        say(self.record.table())
        return True

    def _steps(self) -> int | None:
        return saved_steps(self.module, self.run)

    def _run_ranks(self, logs: Path) -> End:
        environment = {
            **os.environ,
            "MASTER_ADDR": self.job.nodes[0],
            "MASTER_PORT": str(job_port(self.job.id)),
        }
        if self._failed_at is not None:
            environment[exit_codes.FAILED_AT] = f"{self._failed_at:.3f}"
        options = [*self.job.rank_options(), "--kill-on-bad-exit=1", "--wait=60", f"--output={logs}/rank-%t.log"]
        command = self.steps.command(options, "mome_dist.launchers.slurm.rank", self.module, *self.arguments)
        complaints: list[str] = []
        ranks = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        listener = threading.Thread(target=_listen, args=(ranks, complaints), daemon=True)
        listener.start()
        deadline = None
        while ranks.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._told and deadline is None:
                # SIGTERM would make srun kill the ranks; SIGUSR1 it passes on, and they save.
                ranks.send_signal(signal.SIGUSR1)
                known = commands.show_job(self.job.id)
                # A job that is being ended by Slurm is none of our business: its KillWait applies.
                left = tries.seconds_left(known) - _RESERVE_SECONDS if known.get("JobState") == "RUNNING" else math.inf
                deadline = time.monotonic() + max(0.0, min(_STOP_SECONDS, left))
            if deadline is not None and time.monotonic() > deadline:
                say("the ranks did not stop in time; ending them")
                ranks.terminate()  # srun then ends all tasks
                deadline = time.monotonic() + _RESERVE_SECONDS
        listener.join(5)
        code = ranks.returncode if ranks.returncode >= 0 else 128 - ranks.returncode
        found = next((match for match in map(_TASK_ENDED.match, complaints) if match), None)
        lost = any(map(_NODE_ENDED.match, complaints))
        # srun ends with the highest code of all, but the others are only the victims of the first.
        if found is not None and (first := _EXIT_CODE.search(found[4])):
            code = int(first[1])
        if found is None:
            return End(code, f"srun ended with exit code {code}", 0, self._told, lost)
        return End(code, f"rank{found[2]} on {found[1]}: {found[4].strip()}", int(found[3]), self._told, lost)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True  # the loop above acts on it


def _listen(ranks: subprocess.Popen[str], complaints: list[str]) -> None:
    """Repeat and keep what srun says."""
    assert ranks.stderr is not None
    for line in ranks.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        complaints.append(line)


def say(text: str) -> None:
    """A line in the job's own output, with the time."""
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)


def tell_log(log: Path) -> None:
    """Repeat the end of a rank's log."""
    if log.is_file():
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]), flush=True)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return the module, its arguments, and those of the launcher (``launcher.*``)."""
    parser = Parser(prog="python -m mome_dist.launchers.slurm.allocation")
    parser.add_argument("--module", default=DEFAULT_MODULE)
    options, rest = parser.parse_known_args(arguments)
    own = [word for word in rest if word.startswith(PREFIX)]
    return options.module, [word for word in rest if word not in own], own


def load_steps(own: Sequence[str]) -> Steps:
    """How the ranks are started.

    Raises:
        UserError: for a key that a submitted script can no longer act on, or a wrong value.
    """
    for word in own:
        if not word.startswith(STEP_KEYS):
            raise UserError(
                f"{word}: inside a job only {' and '.join(STEP_KEYS)} act; give the others to sbatch or to "
                "mome-dist launch slurm."
            )
    options = load_group("launcher", "slurm", own, SlurmOptions)
    check_container(options)
    return Steps(options.srun, options.container)


def tell_cores(job: Job, module: str, arguments: Sequence[str]) -> None:
    """Say where ranks have fewer cores than their threads."""
    wanted, cores = cores_of_rank(module, arguments), int(os.environ.get("SLURM_CPUS_PER_TASK") or 1)
    if cores < wanted:
        say(
            f"a rank has {cores} of the {wanted} cores that it keeps busy, and GPUs may wait: add "
            f"--cpus-per-task={wanted} to sbatch"
        )


@main_guard
def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then work; the exit code is that of the job."""
    module, rest, own = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    steps = load_steps(own)
    job = Job.from_environment(os.environ)
    try:
        rest = validate_overrides(module, rest, job.world_size)
    except UserError as error:
        raise UserError(
            f"{error} (The allocation has {len(job.nodes)} nodes x {job.tasks_per_node} ranks: --nodes and "
            "--ntasks-per-node of sbatch.)"
        ) from error
    tell_cores(job, module, rest)
    run, tries_allowed = run_directory(module, rest), int(os.environ.get("MAX_TRIES", "3"))
    if module != DEFAULT_MODULE:
        return Allocation(job, run, module, rest, tries_allowed, steps).work()
    with owned(run, "training", "choose another output_dir") as ownership:
        os.environ[TOKEN] = ownership.token  # the ranks share it
        allocation = Allocation(job, run, module, rest, tries_allowed, steps)
        code = allocation.work()
        if allocation.record.state == "waiting":
            ownership.keep()
        return code


if __name__ == "__main__":
    sys.exit(main())
