"""One owner for a directory that is written to, on local, NFS and Lustre file systems.

An owner leaves a record in ``DIRECTORY/.owner/N.json``: who it is, and by the file's time when it was last alive. The
record with the highest number counts. Whoever finds none, a released one, or one whose owner is gone makes the next
number with link(2), which exactly one of several can do, whatever the file system's locks are worth. Numbers are never
used twice, so a slow contender cannot take away what it has not looked at.

An owner is gone when it has released the directory; when its Slurm job was started again (and asks), or is in no queue
any more; when its process has ended on the same machine; or when it has given no sign of life for `LEASE_SECONDS`. A
job in the queue keeps its directory, so that it finds it as it was when it comes back.

The last proof may be wrong: a process can sleep for an hour. So an owner looks again (`Ownership.check`) before it
publishes anything. Its successor removes its record before writing, and touching a removed file fails on NFS as well,
whatever a client has cached.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from mome_dist.errors import UserError
from mome_dist.files import sweep
from mome_dist.processes import ensure_user_name, is_gone, this_process

# Twenty signs of life that did not come, five times as long as an NFS client may trust old times of a file (60 s), and
# far above what the clocks of a cluster differ by: on Lustre, unlike NFS, clients date their files themselves.
LEASE_SECONDS = 300.0
HEARTBEAT_SECONDS = 15.0
TOKEN = "MOME_DIST_OWNER"  # noqa: S105  environment variable: processes that are started on behalf of an owner
FOLDER = ".owner"

_POLL_SECONDS = 0.5
_SLURM_SECONDS = 30
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """Who writes into a directory.

    Attributes:
        token: unlike that of any other owner.
        what: it does, such as "training".
        host, user, command: for people.
        since: local time, ISO 8601.
        process: its number, and its ``identity`` (`mome_dist.processes`).
        cluster, job, restart: of Slurm; the number of restarts tells the starts of a requeued job apart.
        released: whether it has ended and said so.
    """

    token: str
    what: str
    host: str
    user: str
    command: str
    since: str
    process: int
    identity: str
    cluster: str | None
    job: str | None
    restart: int
    released: bool = False

    @classmethod
    def here(cls, what: str) -> Owner:
        """This process."""
        ensure_user_name()
        environment = os.environ
        job = environment.get("SLURM_JOB_ID")
        return cls(
            token=secrets.token_hex(8),
            what=what,
            host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            user=getpass.getuser(),
            command=shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            process=os.getpid(),
            identity=this_process(),
            cluster=environment.get("SLURM_CLUSTER_NAME") if job else None,
            job=job,
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        )

    def __str__(self) -> str:
        place = f"process {self.process} on {self.host}, user {self.user}"
        return f"job {self.job} ({place})" if self.job else place

    @property
    def stop(self) -> str:
        """The command that ends it."""
        elsewhere = "" if self.host == socket.gethostname() else f"ssh {self.host} "
        return f"scancel {self.job}" if self.job else f"{elsewhere}kill {self.process}"


@dataclass(frozen=True)
class _Found:
    """A record as it was read: its number, its owner, and the time of its file."""

    number: int
    owner: Owner
    time: float


class Ownership:
    """A directory that this process, or one that started it, owns.

    Attributes:
        directory: see there.
        token: of the owner, for names of files that no other may touch.
    """

    def __init__(self, directory: Path, owner: Owner, record: Path) -> None:
        self.directory, self.token = directory, owner.token
        self._owner, self._record, self._kept = owner, record, False
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise UserError if another process has taken the directory over; to be called right before publishing."""
        try:
            os.utime(self._record)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            newest = _newest(self._record.parent)
            now = "its record was removed" if newest is None else f"it belongs to {newest.owner} now"
            raise UserError(
                f"{self.directory}: {now}, since this process gave no sign of life for {LEASE_SECONDS:g} s. It stops "
                "and leaves everything there as it is."
            ) from error

    def keep(self) -> None:
        """Do not release the directory at the end: this job waits in the queue and comes back to it."""
        self._kept = True

    def start_beating(self) -> None:
        """Give signs of life until `end`."""
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self) -> None:
        """Stop the signs of life, and release the directory."""
        self._ended.set()
        if self._kept:
            return
        aside = self._record.with_name(f".{self.token}")
        # Without this word the end of the process counts, so that a full disk costs nothing. There is none to say where
        # another owner has taken over, or the directory is gone.
        with suppress(OSError):
            os.utime(self._record)
            _write(aside, replace(self._owner, released=True))
            aside.replace(self._record)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # A sign that fails is one of twenty; whether the directory is lost is asked by `check`.
            with suppress(OSError):
                os.utime(self._record)


@contextmanager
def owned(directory: Path, what: str, otherwise: str, patience_seconds: float = 0.0) -> Iterator[Ownership]:
    """Own a directory, which is made if need be, for the length of a block.

    A process that an owner started with its token in the environment (`TOKEN`) shares the directory with it.

    Args:
        directory: on a file system that all contenders see.
        what: this process is about to do there.
        otherwise: what to do instead of waiting, for the message.
        patience_seconds: how long to wait for another owner's end.

    Raises:
        UserError: another process that may be alive owns it. Nothing was written then.
    """
    ownership, mine = _acquire(directory, what, otherwise, patience_seconds)
    if not mine:
        yield ownership
        return
    ownership.start_beating()
    try:
        yield ownership
    finally:
        ownership.end()


def _acquire(directory: Path, what: str, otherwise: str, patience_seconds: float) -> tuple[Ownership, bool]:
    """Ownership, and whether it is this process's own."""
    folder, deadline = directory / FOLDER, time.monotonic() + patience_seconds
    while True:
        newest = _newest(folder)
        if newest is not None:
            if os.environ.get(TOKEN) == newest.owner.token and not newest.owner.released:
                return Ownership(directory, newest.owner, _path(folder, newest.number)), False
            alive = _sign_of_life(newest, folder)
            if alive is not None:
                if time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                    continue
                owner = newest.owner
                raise UserError(
                    f"{directory} belongs to {owner}, {owner.what} since {owner.since}; {alive}. Wait for its end, "
                    f"stop it with `{owner.stop}`, or {otherwise}."
                )
        taken = _take(folder, 1 if newest is None else newest.number + 1, Owner.here(what))
        if taken is not None:
            owner, record = taken
            return Ownership(directory, owner, record), True
        time.sleep(_POLL_SECONDS * secrets.randbelow(100) / 1000)  # another was faster: see what it is


def _take(folder: Path, number: int, owner: Owner) -> tuple[Owner, Path] | None:
    """Make record ``number``; None if another contender has made it or a later one, or has removed the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    aside, record = folder / f".{owner.token}", _path(folder, number)
    try:
        _write(aside, owner)
        try:
            os.link(aside, record)
        except FileExistsError:
            if aside.stat().st_nlink == 1:  # a file server that answers twice says this of our own link, too
                return None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise UserError(
                f"{folder.parent}: its file system has no hard links ({error.strerror}), without which a directory "
                "cannot have one owner; choose a directory on another one."
            ) from error
        numbers = _numbers(folder)
        if max(numbers, default=number) > number:  # what we took for the newest was an old picture of the folder
            record.unlink(missing_ok=True)
            return None
        for old in numbers:
            if old < number:
                _path(folder, old).unlink(missing_ok=True)
        now = aside.stat().st_mtime
        sweep(folder.parent)
        for left in folder.glob(".*"):  # of contenders that were killed
            with suppress(FileNotFoundError):
                if now - left.stat().st_mtime > LEASE_SECONDS:
                    left.unlink()
        return owner, record
    except FileNotFoundError:
        return None
    finally:
        aside.unlink(missing_ok=True)


def _sign_of_life(found: _Found, folder: Path) -> str | None:
    """Why an owner is not known to be gone; None if it is."""
    owner = found.owner
    if owner.released:
        return None
    if owner.job is not None:
        same = (owner.job, owner.cluster) == (os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME"))
        if same and owner.restart < int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            return None  # Slurm starts a job again only when its last start has ended
        state = None if same else _queue_state(owner.job, owner.cluster)
        if state is not None:
            return f"the job is {state.lower()}" if state else None
    if is_gone(owner.identity):
        return None
    with suppress(FileNotFoundError):  # the folder was removed
        silence = max(_now(folder) - found.time, 0.0)
        if silence <= LEASE_SECONDS:
            return f"its last sign of life is {silence:.0f} s old, after {LEASE_SECONDS:g} s it counts as gone"
    return None


def _newest(folder: Path) -> _Found | None:
    """The record that counts, if there is one."""
    while numbers := _numbers(folder):
        number = max(numbers)
        try:
            # Opening a file makes an NFS client ask the server for its times.
            with _path(folder, number).open(encoding="utf-8") as file:
                return _Found(number, Owner(**json.load(file)), os.fstat(file.fileno()).st_mtime)
        except (FileNotFoundError, TypeError, ValueError) as error:
            if number in _numbers(folder):
                raise UserError(f"{_path(folder, number)} is no record of an owner; remove it.") from error
    return None


def _numbers(folder: Path) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(path.stem) for path in folder.iterdir() if re.fullmatch(r"\d+\.json", path.name)]
    return []


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _write(path: Path, owner: Owner) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(owner), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _now(folder: Path) -> float:
    """The time by the clock that dates the files of a folder."""
    probe = folder / f".{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _queue_state(job: str, cluster: str | None) -> str | None:
    """State of a Slurm job such as ``RUNNING``, empty if it is in no queue; None where nobody knows."""
    if shutil.which("squeue") is None:
        return None
    try:
        # Another cluster may have a job of this number, or none.
        config, queue = (
            subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False)
            for command in (
                ["scontrol", "show", "config"],
                ["squeue", "--noheader", f"--jobs={job}", "--format=%A %T"],
            )
        )
    except subprocess.TimeoutExpired:
        return None
    here = re.search(r"^ClusterName\s*=\s*(\S+)", config.stdout, re.MULTILINE)
    if here is None or here[1] != cluster:
        return None
    if queue.returncode:
        return "" if "Invalid job id" in queue.stderr else None
    lines = [line.split() for line in queue.stdout.splitlines()]
    return next((line[1] for line in lines if len(line) == 2 and line[0] == job), "")
