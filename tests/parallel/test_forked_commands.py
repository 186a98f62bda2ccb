"""Forks that stand for commands do what interpreters of their own do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked_commands
from tests.patience import patience

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, signal, sys, time
print(sys.argv, os.getcwd(), os.environ["WORD"], "HOME" in os.environ, __name__, flush=True)
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1), flush=True)
print("said", file=sys.stderr, flush=True)
"""
ENDS = ["", "sys.exit(3)", "sys.exit('words')", "raise KeyError('it')", "os.kill(os.getpid(), signal.SIGKILL)"]


def own(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, list[str]]:
    """Code, output and the last line of errors of a command that has an interpreter of its own."""
    command = [sys.executable, *words]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which jobs in a script's background ignore
    )
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return code, done.stdout, done.stderr.splitlines()[-1:]


def forked(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, list[str]]:
    """The same of a fork."""
    done = forked_commands.run(words, folder, environment, patience(60))
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_as_in_an_interpreter(tmp_path: Path, end: str) -> None:
    (tmp_path / "it.py").write_text(SCRIPT + end)
    environment, before = {"WORD": "it", "PATH": os.environ["PATH"]}, dict(os.environ)
    arguments = (["it.py", "a", "b c"], tmp_path, environment)
    assert forked(*arguments) == own(*arguments)
    assert dict(os.environ) == before


def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text("import time; time.sleep(600)")
    assert forked_commands.run(["it.py"], tmp_path, os.environ, 0.5).returncode == 124


def test_ranks_are_those_of_the_launcher(tmp_path: Path) -> None:
    found = []
    for name, start in (("own", own), ("forked", forked)):
        folder = tmp_path / name
        folder.mkdir()
        words = ["-m", "launchers.local", "--nproc", "2", "--log-dir", str(folder), "--module"]
        actions = [f"*:write-environment={folder}", "0:say=first", "1:say=second", "1:exit=7"]
        ended = start([*words, "tests.unit.launcher_probe", *actions], ROOT, dict(os.environ))
        places = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        ports = {place.pop("MASTER_PORT") for place in places}
        for place in places:
            place.pop("LD_LIBRARY_PATH", None)  # every interpreter that imports OpenCV puts another folder before it
        found.append((*ended[:2], places, len(ports), (folder / "rank-1.log").read_text()))
    assert found[1] == found[0]
    assert found[0][:2] == (7, "first\n") and found[0][-1] == "second\n"
