"""One owner for a directory, with real processes: who gets it, when it changes hands, and what a loser finds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mome_dist import ownership
from mome_dist.errors import UserError
from mome_dist.files import aside, sweep
from mome_dist.ownership import LEASE_SECONDS, TOKEN, owned

ROOT = Path(__file__).resolve().parents[2]
# Own a directory until killed, or for a moment; on a conflict end with code 2.
HOLD = """
import sys, time
from pathlib import Path
from mome_dist.cli import main_guard
from mome_dist.ownership import owned

@main_guard
def main():
    with owned(Path(sys.argv[1]), "holding", "go elsewhere"):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))

sys.exit(main())
"""


def start(directory: Path, /, seconds: float = 60, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), str(seconds)],
        env={**os.environ, **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holder(directory: Path, **variables: str) -> subprocess.Popen[str]:
    """A process that owns the directory by now."""
    process = start(directory, 60, **variables)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


def record(directory: Path) -> Path:
    [path] = (directory / ".owner").glob("*.json")
    return path


def silent_for(seconds: float, path: Path) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_second_process_is_refused_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = holder(run)
    before = sorted(tmp_path.rglob("*"))
    second = start(run)
    out, err = second.communicate()
    assert (second.returncode, out) == (2, "")
    assert err.startswith(f"error: {run} belongs to process {first.pid} on ") and err.count("\n") == 1
    assert re.search(rf"; its last sign of life is \d+ s old, after {LEASE_SECONDS:g} s it counts as gone\.", err)
    assert err.endswith(f" Wait for its end, stop it with `kill {first.pid}`, or go elsewhere.\n")
    assert sorted(tmp_path.rglob("*")) == before
    end(first)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_owns_nothing(tmp_path: Path, how: int) -> None:
    first = holder(tmp_path)
    end(first, how)
    assert json.loads(record(tmp_path).read_text())["released"] == (how == signal.SIGTERM)
    with owned(tmp_path, "testing", "stop"):
        assert record(tmp_path).name == "2.json"
    assert [path.name for path in (tmp_path / ".owner").iterdir()] == ["2.json"]


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked for its exit code
    with owned(tmp_path, "testing", "stop"):
        pass
    first.communicate()


def test_the_lease_decides_where_nothing_else_does(tmp_path: Path) -> None:
    with owned(tmp_path, "testing", "stop"):
        changed(record(tmp_path), identity="0123456789ab-1-1")  # of another machine
        silent_for(LEASE_SECONDS - 20, record(tmp_path))
        with pytest.raises(UserError, match=r"its last sign of life is 2(79|80|81) s old"), owned(tmp_path, "x", "y"):
            pass
        silent_for(LEASE_SECONDS + 1, record(tmp_path))
        with owned(tmp_path, "testing", "stop") as second:
            second.check()


def test_an_owner_that_slept_finds_out_before_it_publishes(tmp_path: Path) -> None:
    with owned(tmp_path, "sleeping", "stop") as first:
        first.check()
        silent_for(LEASE_SECONDS + 1, record(tmp_path))
        second = holder(tmp_path)  # this process lives, and is taken for gone
        with pytest.raises(UserError, match=rf"it belongs to process {second.pid} .* now, since this process gave no"):
            first.check()
    assert record(tmp_path).name == "2.json"
    assert not json.loads(record(tmp_path).read_text())["released"], "the first released what is not its own"
    end(second)


def test_owners_give_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    with owned(tmp_path, "testing", "stop"):
        silent_for(100, record(tmp_path))
        deadline = time.monotonic() + 20
        while record(tmp_path).stat().st_mtime < time.time() - 50:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_requeued_job_takes_over_and_others_ask_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def slurm(squeue: str, cluster: str = "here") -> None:
        for name, script in (("squeue", squeue), ("scontrol", f"echo 'ClusterName = {cluster}'")):
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)

    run = tmp_path / "run"
    slurm("echo '7 RUNNING'")
    job = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "here"}
    first = holder(run, **job)
    # Nobody but the queue knows how it is: it is on another machine, and has been silent for long.
    changed(record(run), identity="0123456789ab-1-1")
    silent_for(10 * LEASE_SECONDS, record(run))

    def refusal(**variables: str) -> str:
        process = start(run, 0, **variables)
        _, err = process.communicate()
        return err if process.returncode else ""

    assert f"belongs to job 7 (process {first.pid} on " in refusal()
    assert "; the job is running. Wait for its end, stop it with `scancel 7`, or go elsewhere." in refusal()
    slurm("echo '7 PENDING'")
    assert "the job is pending" in refusal(SLURM_JOB_ID="8", SLURM_CLUSTER_NAME="here")
    silent_for(5, record(run))
    slurm("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", cluster="elsewhere")
    assert "its last sign of life is" in refusal(), "a job of another cluster"
    slurm("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "its last sign of life is" in refusal(), "nobody knows"
    assert "its last sign of life is" in refusal(**job), "the same start of the job"
    assert refusal(**job, SLURM_RESTART_COUNT="1") == ""
    changed(record(run), released=False, identity="0123456789ab-1-1")
    slurm("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert refusal() == "", "the job is over"
    end(first)


def test_processes_of_an_owner_share_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owned(tmp_path, "watching", "stop") as first:
        assert start(tmp_path, 0).wait() == 2
        monkeypatch.setenv(TOKEN, first.token)
        assert start(tmp_path, 0).wait() == 0
        first.check()
        assert not json.loads(record(tmp_path).read_text())["released"]
    assert start(tmp_path, 0).wait() == 0, "a token is worth nothing after the end"


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    first = start(tmp_path, 1)
    assert first.stdout is not None
    first.stdout.readline()
    began = time.monotonic()
    with owned(tmp_path, "testing", "stop", patience_seconds=60):
        assert time.monotonic() - began > 0.2
        first.wait(1)
    first.communicate()


def test_of_many_contenders_for_a_dead_owners_directory_one_wins(tmp_path: Path) -> None:
    """Again and again: whoever owns the directory makes a file that must not be there, and takes it away at the end."""

    def contend(gate: int) -> int:
        os.read(gate, 1)
        witness, won = tmp_path / "witness", 0
        while won < 5:
            try:
                with owned(tmp_path, "contending", "stop"):
                    os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
                    time.sleep(0.001)
                    witness.unlink()
                    won += 1
            except UserError:
                pass
        return won

    first = holder(tmp_path)
    end(first)
    read, write = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 255
            try:
                os.close(write)
                code = contend(read)
            finally:
                os._exit(code)
        children.append(child)
    os.close(read)
    os.close(write)  # opens the gate for all
    won = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert won == [5] * 6, "two owners at once"
    assert record(tmp_path).name == "31.json", "every owner has a number of its own"
    assert [path.name for path in (tmp_path / ".owner").iterdir()] == [record(tmp_path).name]


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / ".owner").mkdir()
    (tmp_path / ".owner/3.json").write_text("{}")
    with pytest.raises(UserError, match=r"3\.json is no record of an owner; remove it"), owned(tmp_path, "x", "y"):
        pass


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    def left_by(process: Callable[[], None]) -> None:
        child = os.fork()
        if child == 0:
            process()
        os.waitpid(child, 0)

    def killed() -> None:
        with aside(tmp_path / "corpus"):
            os.kill(os.getpid(), signal.SIGKILL)

    left_by(killed)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".corpus.") and left.name.endswith(".aside")
    (tmp_path / ".corpus.abc.0123456789ab-1-1.aside").mkdir()  # of another machine
    with aside(tmp_path / "corpus") as mine:
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, ".corpus.abc.0123456789ab-1-1.aside"}
