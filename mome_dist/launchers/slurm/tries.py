"""The record of a job: every try, why it ended and how far it came; and whether another one can help."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from mome_dist.config import load_config
from mome_dist.files import write_json
from mome_dist.launchers.options import DEFAULT_MODULE
from mome_dist.trained import with_key

FINISHED = "finished"
TIME_LIMIT = "time limit"
PREEMPTED = "preempted"
REQUEUED = "requeued"
ASKED = "asked to save and wait"
CANCELLED = "cancelled"
NODE_LOST = "node failed"
NODES_AWAY = "nodes could not be reached"
UNKNOWN = "ended without a word"
# Ends that say nothing about the run itself: the cluster wanted the nodes, or lost one.
_OUTSIDE = (PREEMPTED, REQUEUED, ASKED, NODE_LOST)
_BY_STATE = {"NODE_FAIL": NODE_LOST, "PREEMPTED": PREEMPTED, "REQUEUED": REQUEUED}
SUMMARY = "summary.json"
# A warning that comes earlier than this before the end is not taken for one of the time limit.
_LONGEST_WARNING_SECONDS = 900.0


@dataclass
class Try:
    """One start of all ranks.

    Attributes:
        number: from 1 on.
        nodes: their names; rank 0 is on the first.
        started, ended: local time, ISO 8601; ``ended`` is None while it runs.
        reason: why it ended.
        exit_code: of the ranks; None where nobody was there to see it.
        first_step, last_step: newest saved step before and after; None for what saves no steps.
    """

    number: int
    nodes: list[str]
    started: str
    first_step: int | None
    ended: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    last_step: int | None = None


@dataclass
class Record:
    """A job and its tries, kept in ``summary.json``.

    Attributes:
        job: its number.
        module, arguments: what its ranks run.
        state: "running", "waiting" (to be started again), "finished", "failed" or "cancelled".
        held: why Slurm keeps a waiting job until somebody releases it; None where it comes back by itself.
        release: the command that lets a held job come back.
        exit_code: of the job; None until it ends for good.
    """

    folder: Path
    job: str
    module: str
    arguments: list[str]
    state: str = "running"
    held: str | None = None
    release: str | None = None
    exit_code: int | None = None
    tries: list[Try] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, job: str, module: str, arguments: list[str]) -> Record:
        """The record of this job so far; a new one at its first start."""
        record = cls(folder, job, module, list(arguments))
        if (folder / SUMMARY).is_file():
            saved = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            record.tries = [Try(**entry) for entry in saved["tries"]]
        return record

    def begin(self, nodes: list[str], step: int | None) -> Try:
        """Note the start of a try."""
        self.tries.append(Try(len(self.tries) + 1, nodes, _now(), step))
        self.state, self.held, self.release = "running", None, None
        self.save()
        return self.tries[-1]

    def end(
        self, reason: str, exit_code: int | None, step: int | None, state: str, known: Mapping[str, str] | None = None
    ) -> None:
        """Note the end of the last try, and what becomes of the job.

        Args:
            known: of a job that waits, what ``scontrol show job`` says.
        """
        last = self.tries[-1]
        last.ended, last.reason, last.exit_code, last.last_step = _now(), reason, exit_code, step
        self.state = state
        if state == "waiting" and (held := why_held(known or {})):
            self.held, self.release = held, release_command(self.job)
        if state not in ("running", "waiting"):
            self.exit_code = exit_code
        self.save()

    def fail(self, exit_code: int) -> None:
        """Note that the job ends for good without another try."""
        self.state, self.exit_code = "failed", exit_code
        self.save()

    def close_unfinished(self, ends: Sequence[str], step: int | None) -> None:
        """Note why the try before a requeue ended, where nobody was left to do it.

        Args:
            ends: of the job's earlier starts, as its accounting has them (`commands.earlier_ends`).
        """
        if self.tries and self.tries[-1].ended is None:
            reason = next((_BY_STATE[end] for end in reversed(ends) if end in _BY_STATE), UNKNOWN)
            self.end(reason, None, step, "running")

    def save(self) -> None:
        """Write the summary, whole or not at all."""
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / SUMMARY, content)

    def failures_without_progress(self) -> int:
        """How many of the last tries failed, or ran out of time, before they saved a further step."""
        count = 0
        for entry in reversed(self.tries):
            if entry.reason in _OUTSIDE:
                continue
            if entry.ended is None or (entry.last_step or 0) > (entry.first_step or 0):
                break
            count += 1
        return count

    def table(self) -> str:
        """The record in plain text, one line a try."""
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        held = "" if self.held is None else f", held by Slurm ({self.held}) until `{self.release}`"
        rows = [f"job {self.job}: {self.state}{code}{held}"]
        for entry in self.tries:
            steps = "" if entry.last_step is None else f"  steps {entry.first_step} -> {entry.last_step}"
            rows.append(
                f"  try {entry.number}  {entry.started} to {entry.ended or 'now'}  {' '.join(entry.nodes)}{steps}  "
                f"{entry.reason or 'running'}" + (f" (exit code {entry.exit_code})" if entry.exit_code else "")
            )
        return "\n".join(rows)


def saved_steps(module: str, run: Path) -> int | None:
    """The newest step that a training run has saved, 0 when it has none; None for other modules.

    Checkpoints appear whole under their final names, so the names are enough.
    """
    if module != DEFAULT_MODULE:
        return None
    numbers = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def run_directory(module: str, arguments: Sequence[str]) -> Path:
    """Where the logs of a run belong: its output directory, or that of the checkpoint it works on."""
    if module == DEFAULT_MODULE:
        return Path(load_config(arguments).output_dir)
    words = with_key(arguments, "checkpoint")
    named = next((word.partition("=")[2] for word in words if word.startswith("checkpoint=")), None)
    return Path(named) if named else Path("runs")


def why_stopped(known: Mapping[str, str]) -> str:
    """Why Slurm, or somebody, asked a job to stop.

    Args:
        known: what ``scontrol show job`` says (`commands.show_job`).
    """
    if known.get("JobState") == "CANCELLED":
        return CANCELLED
    if known.get("JobState") == "NODE_FAIL":
        return NODE_LOST
    if known.get("PreemptTime", "None") != "None":
        return PREEMPTED
    if known.get("JobState") != "RUNNING":
        return REQUEUED
    return TIME_LIMIT if seconds_left(known) < _LONGEST_WARNING_SECONDS else ASKED


def why_held(known: Mapping[str, str]) -> str | None:
    """Slurm's reason to keep a job in the queue until somebody releases it; None for a job that it does not hold.

    Slurm holds a job (``JobHeldUser``, ``JobHeldAdmin``, ``job_requeued_in_held_state``,
    ``launch_failed_requeued_held``, ...) by taking away its priority, also while it runs or ends.

    Args:
        known: what ``scontrol show job`` says (`commands.show_job`).
    """
    return known["Reason"] if known.get("Priority") == "0" else None


def release_command(job: str) -> str:
    """What a user types to let a held job start."""
    return f"scontrol release {job}"


def seconds_left(known: Mapping[str, str]) -> float:
    """Seconds to the end of an allocation, infinite where there is none."""
    try:
        return datetime.fromisoformat(known.get("EndTime", "Unknown")).timestamp() - time.time()
    except ValueError:
        return float("inf")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
