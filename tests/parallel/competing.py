"""Two runs that compete for one output directory while they are killed, or put to sleep, at random moments.

    python -m tests.parallel.competing --kills 200

A run here is all that touches the directory, with real processes: it owns the directory as training does
(`owned_run`), looks at every checkpoint that is there, resumes from the newest, and saves one after the other through
`CheckpointSaver`. Only what it saves is made up: tensors that hold the number of the step. When it is killed or refused
it starts again. What is shown: a checkpoint under its name is always whole, no step is lost, and unless owners are put
to sleep for longer than their lease, there are never two of them.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mome_dist import ownership
from mome_dist.checkpoint.format import CheckpointReader, checkpoints_of
from mome_dist.checkpoint.save import CheckpointSaver, Held, Snapshot
from mome_dist.config import RunConfig
from mome_dist.errors import UserError
from mome_dist.parallel.layout import Layout
from mome_dist.sharing import Sharing
from mome_dist.training.run_directory import owned_run

REFUSED, DAMAGED, LOST, TWO_OWNERS, OVERTAKEN = 2, 40, 41, 42, 43
_LEASE_SECONDS = 0.3  # where runs are put to sleep


NO_MODEL: Any = None


class _Saver(CheckpointSaver):
    def _snapshot(self, step: int, *_: Any) -> Snapshot:
        tensors = {f"model/{name}": Held(torch.full((4096,), float(step)), None, Sharing()) for name in "abcdef"}
        return Snapshot(tensors, {"step": step, "optimizer": "adamw", "data": {}, "frozen": {}})


@dataclass
class Report:
    """What was seen.

    Attributes:
        sleeps: how many.
        ends: of runs by exit code; those that were killed have minus the signal.
        resumed: the step that each owner found as the newest, in the order of owners.
    """

    sleeps: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    resumed: list[int] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.ends[-signal.SIGKILL]


def compete(folder: Path, kills: int, seed: int, sleeping: bool = False, overtaken: int = 0) -> Report:
    """Let two runs compete until so many were killed; raises AssertionError if anything is damaged or lost.

    Args:
        folder: empty.
        sleeping: also put runs to sleep for longer than the lease, which is short then.
        overtaken: go on until so many runs that slept found another owner in their place.
    """
    chance, report, running = random.Random(seed), Report(), dict.fromkeys(range(2), 0)
    log = folder / "resumed"
    log.touch()

    def tend(seconds: float) -> None:
        """Start again what has ended, for some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for slot, process in running.items():
                if process:
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        report.ends[os.waitstatus_to_exitcode(status)] += 1
                        process = 0
                running[slot] = process or _start(folder, log, sleeping)
            time.sleep(0.05)

    try:
        while report.kills < kills or report.ends[OVERTAKEN] < overtaken:
            tend(0.05 + chance.uniform(0.0, 0.9))
            victim = running[chance.randrange(2)]
            if sleeping and chance.random() < 0.5:
                os.kill(victim, signal.SIGSTOP)
                tend(chance.uniform(0.0, 4 * _LEASE_SECONDS))
                with suppress(ProcessLookupError):  # it had ended just before
                    os.kill(victim, signal.SIGCONT)
                report.sleeps += 1
            else:
                os.kill(victim, signal.SIGKILL)
    finally:
        for process in running.values():
            if process:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    report.resumed = [int(line) for line in log.read_text().split()]
    assert not {DAMAGED, LOST, TWO_OWNERS, 1, 255} & set(report.ends), report
    assert report.resumed == sorted(report.resumed), "steps were lost"
    return report


def _start(folder: Path, log: Path, sleeping: bool) -> int:
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = _run(folder, log, sleeping)
        finally:
            os._exit(code)
    return child


def _run(folder: Path, log: Path, sleeping: bool) -> int:
    """One run, until it is killed; its exit code says why it ended by itself."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sleeping:
        ownership.LEASE_SECONDS, ownership.HEARTBEAT_SECONDS = _LEASE_SECONDS, _LEASE_SECONDS / 10
    config = RunConfig(output_dir=str(folder / "run"))
    config.training.keep_checkpoints = 2
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with owned_run(config) as owner, (folder / "witness").open("a") as witness:
            if not sleeping:
                try:
                    fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the run is killed
                except BlockingIOError:
                    return TWO_OWNERS
            try:
                step = max((_whole(path) for path in checkpoints_of(config.output_dir)), default=0)
            except UserError:
                return DAMAGED
            saver = _Saver(config, Layout(1, 1, 1, 1), {}, {}, lambda done: done, owner)
            assert owner is not None
            owner.check()
            with log.open("a") as file:
                file.write(f"{step}\n")
            try:
                while True:
                    step += 1
                    saver.save(step, NO_MODEL, NO_MODEL)
            except UserError:
                return OVERTAKEN
    except UserError:
        return REFUSED


def _whole(checkpoint: Path) -> int:
    """The step of a checkpoint whose every byte is as it was written."""
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
        tensors = {name: reader.read(name) for name in reader.names()}
        if any(not bool((tensor == reader.step).all()) for tensor in tensors.values()) or len(tensors) != 6:
            raise UserError(f"{checkpoint} is of several steps")
        return reader.step


def main() -> None:
    """Compete as asked and print what was seen."""
    import tempfile

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sleeping", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = compete(Path(folder), options.kills, options.seed, options.sleeping)
    print(f"{report.kills} kills, {report.sleeps} sleeps; ends by exit code: {dict(report.ends)}")
    print(f"{len(report.resumed)} owners, one after the other; they found steps {report.resumed}")


if __name__ == "__main__":
    main()
