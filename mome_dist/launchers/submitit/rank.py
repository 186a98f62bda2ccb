"""One rank under Submitit: a child process that trains, in a task that Submitit's signals reach.

Submitit warns every task of a job with SIGUSR2; in the first one its handler then calls ``checkpoint()`` and requeues
the job. Here the child is told to save first (SIGUSR1) and awaited, so that nothing is lost. A crash, or a rank that
was lost, ends the same way while tries are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.job_environment import JobEnvironment

from mome_dist.exit_codes import INTERRUPTED, PREEMPTED, USER_ERROR
from mome_dist.files import write_text
from mome_dist.launchers.slurm import commands, tries
from mome_dist.launchers.slurm.job import job_port
from mome_dist.launchers.slurm.rank import become_task
from mome_dist.launchers.slurm.tries import Record

_POLL_SECONDS = 0.2
_PORT_SECONDS = 120.0  # for the first rank to say its port: the tasks of a job may start far apart
_REQUEUE_SECONDS = 30.0  # for the first rank to requeue the job before another one does
_END_SECONDS = 120.0  # for Slurm to end the tasks of a job that was requeued
_WARNING: signal.Signals = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")


class RankError(RuntimeError):
    """A rank failed for good; the log of its Submitit task says why."""


def run_rank(module: str, arguments: Sequence[str], max_tries: int) -> None:
    """Run this task's rank to its end; does not return where the job is requeued, because Submitit then ends the task.

    Args:
        max_tries: failures in a row without a further checkpoint after which the job ends.

    Raises:
        RankError: the rank failed, and another try would not help.
    """
    job = submitit.JobEnvironment()
    run = tries.run_directory(module, arguments)
    folder = run / "slurm" / job.job_id
    record = Record.open(folder, job.job_id, module, list(arguments))
    if job.global_rank == 0:
        record.close_unfinished(commands.earlier_ends(job.job_id), tries.saved_steps(module, run))
        record.begin(list(job.hostnames), tries.saved_steps(module, run))
    code = run_child(module, arguments, {"MASTER_ADDR": job.hostnames[0], "MASTER_PORT": _port(job, folder)})
    known = {} if code == 0 else commands.show_job(job.raw_job_id)
    final = code in (0, USER_ERROR, INTERRUPTED) or known.get("JobState") == "CANCELLED"
    if job.global_rank == 0:
        reason, state = _judge(code, known, final)
        record.end(reason, code, tries.saved_steps(module, run), state, known)
        final = final or record.failures_without_progress() >= max_tries
        if final and code:
            record.fail(code)
        print(record.table(), flush=True)
    if code == 0:
        return
    if final:
        raise RankError(f"rank {job.global_rank} ended with exit code {code}; its log is {job.paths.stdout}")
    _requeue(job, known)


def run_child(module: str, arguments: Sequence[str], rendezvous: dict[str, str]) -> int:
    """Run the rank, pass Submitit's warning on as SIGUSR1, and return the exit code. Submitit's handler comes back."""
    warnings: list[int] = []
    submitits = signal.signal(_WARNING, lambda number, _: warnings.append(number))
    try:
        # Slurm signals every process of a task; only this one shall take Submitit's warning.
        rank = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**become_task(os.environ), **rendezvous},
            preexec_fn=lambda: signal.signal(_WARNING, signal.SIG_IGN),
        )
        told = False
        while rank.poll() is None:
            if warnings and not told:
                rank.send_signal(signal.SIGUSR1)
                told = True
            time.sleep(_POLL_SECONDS)
    finally:
        signal.signal(_WARNING, submitits)
    if rank.returncode == -signal.SIGUSR1:
        return PREEMPTED  # told before it listened: it had not begun to train
    return rank.returncode if rank.returncode >= 0 else 128 - rank.returncode


def _judge(code: int, known: dict[str, str], final: bool) -> tuple[str, str]:
    """The reason of an end for the record, and what becomes of the job."""
    if code == 0:
        return tries.FINISHED, "finished"
    if known.get("JobState") == "CANCELLED":
        return tries.CANCELLED, "cancelled"
    if code == PREEMPTED:
        return tries.why_stopped(known), "waiting"
    return f"rank 0: exit code {code}", "failed" if final else "waiting"


def _requeue(job: JobEnvironment, known: dict[str, str]) -> None:
    """Have the job requeued by Submitit, in its first rank; wait until Slurm ends this task."""
    if known.get("JobState") == "RUNNING":
        handler = signal.getsignal(_WARNING)
        if job.global_rank == 0 and callable(handler):
            handler(_WARNING, None)  # calls checkpoint(), requeues, and exits
        time.sleep(_REQUEUE_SECONDS)
        if commands.show_job(job.raw_job_id).get("JobState") == "RUNNING":
            commands.requeue(job.raw_job_id)
    time.sleep(_END_SECONDS)
    raise RankError(f"job {job.job_id} was requeued, but Slurm has not ended its tasks")


def _port(job: JobEnvironment, folder: Path) -> str:
    """The port of this start of the job, which its first rank chooses and writes down for the others."""
    start = os.environ.get("SLURM_RESTART_COUNT", "0")  # unset at the first start
    note = folder / f"port-{start}"
    if job.global_rank == 0:
        write_text(note, str(job_port(job.raw_job_id)))
    deadline = time.monotonic() + _PORT_SECONDS
    while not note.exists():
        if time.monotonic() > deadline:
            raise RankError(f"the first rank, on {job.hostnames[0]}, did not write {note} within {_PORT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return note.read_text(encoding="utf-8")
