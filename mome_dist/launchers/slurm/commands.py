"""The few Slurm commands that the launchers use; each has a timeout and is asked again while the controller is away."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence

from mome_dist.errors import UserError

_TIMEOUT_SECONDS = 30
_PATIENCE_SECONDS = 600  # how long a controller may be away, such as for an upgrade
_AWAY = ("Unable to contact slurm controller", "Connection refused", "timed out", "Transport endpoint")
_ACCOUNTING_SECONDS = 5.0  # how long the accounting may lag behind the controller


def require_slurm(program: str = "sbatch") -> None:
    """Raise `UserError` where there is no Slurm."""
    if shutil.which(program) is None:
        raise UserError(
            f"there is no {program} on this machine: run this on a login node of a Slurm cluster, or start the same "
            "run here with `mome-dist launch --nproc N`."
        )


def ask(command: Sequence[str]) -> str:
    """Run a Slurm command and return its output.

    Raises:
        subprocess.CalledProcessError: it failed for another reason than an absent controller.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS
            ).stdout.strip()
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise
        except subprocess.CalledProcessError as error:
            if time.monotonic() > deadline or not any(word in error.stderr for word in _AWAY):
                raise
        time.sleep(2.0)


def hostnames(node_list: str) -> list[str]:
    """``node[1-2]`` -> ``node1``, ``node2``."""
    return ask(["scontrol", "show", "hostnames", node_list]).split()


def show_job(job: str) -> dict[str, str]:
    """What the controller knows of a job, by the names that ``scontrol show job`` uses; empty when it knows none.

    For a job that is being ended because it was cancelled, ``JobState`` is ``CANCELLED``; the controller says
    ``COMPLETING`` of that and of a requeue alike, and only the accounting tells them apart.
    """
    try:
        told = ask(["scontrol", "--oneliner", "show", "job", job])
    except subprocess.CalledProcessError as error:
        if "Invalid job id" in error.stderr:
            return {}
        raise
    known = dict(re.findall(r"(\w+)=(\S*)", told))
    if known.get("JobState") == "COMPLETING":
        deadline = time.monotonic() + _ACCOUNTING_SECONDS
        while (ends := earlier_ends(job)) and ends[-1] == "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.5)
        if ends and ends[-1] == "CANCELLED":
            known["JobState"] = "CANCELLED"
    return known


def requeue(job: str) -> None:
    """Put a running job back into the queue under its own number; the controller ends this allocation."""
    ask(["scontrol", "requeue", job])


def earlier_ends(job: str) -> list[str]:
    """How each earlier start of a requeued job ended (``REQUEUED``, ``PREEMPTED``, ``NODE_FAIL``), by its accounting.

    Empty where there is no accounting.
    """
    try:
        told = ask(["sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State", "-j", job])
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.split()[0] for line in told.splitlines() if line.split()]
