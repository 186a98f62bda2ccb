"""Which process and user this is, in words that others can check: for files that outlive whoever made them."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
from functools import cache
from pathlib import Path

IDENTITY = re.compile(r"([0-9a-f]{12})-(\d+)-(\d+)")
_NOWHERE = secrets.token_hex(6)  # where there is no /proc: like no other machine, so that nothing is proven


def identity_of(process: int) -> str | None:
    """Machine, number and start of a process here; None if it does not run. Unlike numbers it is never used again."""
    started = _started(process)
    return None if started is None else f"{_machine()}-{process}-{started}"


def this_process() -> str:
    """Identity of this process."""
    return identity_of(os.getpid()) or f"{_NOWHERE}-{os.getpid()}-0"


def is_gone(identity: str) -> bool:
    """Whether the process of an identity is known to have ended; False for one of another machine."""
    found = IDENTITY.fullmatch(identity)
    return found is not None and found[1] == _machine() and identity_of(int(found[2])) != identity


def ensure_user_name() -> None:
    """Give a user whom the system does not know a name, for this process and those that it starts.

    Containers run under such numbers. PyTorch and others ask for the name, for directories of their own, and fail.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


@cache
def _machine() -> str:
    """What process numbers mean something in: this boot of this machine, and the namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return hashlib.sha256(f"{boot} {Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:12]
    except OSError:
        return _NOWHERE


def _started(process: int) -> int | None:
    """When a process started, in clock ticks after the boot; None if there is nothing of it but its exit code.

    A killed process looks dead while threads of it are still within a call to the system, such as a rename.
    """
    place = Path(f"/proc/{process}")
    try:
        state, *fields = (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ended = state in ("Z", "X") and len(list((place / "task").iterdir())) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if ended else int(fields[18])
