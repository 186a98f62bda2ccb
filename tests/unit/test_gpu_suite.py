"""The runner of the checks on a GPU, with real processes: what passes, fails, hangs or dies, and what is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mome_dist.cli import main_guard
from mome_dist.errors import UserError
from tools import gpu_suite
from tools.gpu_suite import CHECKS, FAILED, FIGURES, PASSED, ROOT, TIMED_OUT, Check, chosen_checks, run_suite

LIMIT = 20.0
LEAVES_FIGURES = f"""
import json, os, pathlib
pathlib.Path(os.environ["{FIGURES}"]).write_text(json.dumps({{"device": os.environ["{gpu_suite.DEVICE}"]}}))
"""
# A child that outlives its parent, in the same process group; both ignore a request to end.
HANGS = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("waiting for ever", flush=True)
time.sleep(600)
"""


def _check(name: str, code: str, *arguments: str, seconds: float = LIMIT) -> Check:
    return Check(name, f"that {name}", seconds / gpu_suite.PATIENCE, ("-c", code, *arguments))


def _run(results: Path, checks: list[Check], *arguments: str) -> int:
    options = gpu_suite.parse_arguments(["--rehearse", "--results", str(results), *arguments])
    return run_suite(options, checks)


def _outcome(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}.json").read_text())


def _ends(pid: int) -> bool:
    """Whether a process that was killed is gone, soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_every_check_has_an_outcome_whatever_becomes_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = tmp_path / "child"
    checks = [
        _check("fails", "import sys; print('seven is not eight'); sys.exit(3)"),
        _check("hangs", HANGS, str(child), seconds=3.0),
        _check("dies", "import os; os.kill(os.getpid(), 11)"),
        _check("passes", LEAVES_FIGURES),
    ]
    assert _run(tmp_path, checks) == 1
    found = {check.name: _outcome(tmp_path, check.name) for check in checks}
    assert {name: (each["verdict"], each["exit_code"]) for name, each in found.items()} == {
        "fails": (FAILED, 3),
        "hangs": (TIMED_OUT, -signal.SIGKILL),
        "dies": (FAILED, -signal.SIGSEGV),
        "passes": (PASSED, 0),
    }
    assert found["passes"]["figures"] == {"device": "cpu"} and found["fails"]["tail"] == ["seven is not eight"]
    assert found["hangs"]["tail"] == ["waiting for ever"] and 3 <= found["hangs"]["seconds"] < LIMIT
    assert _ends(int(child.read_text())), "the group outlived its limit"
    shown = capsys.readouterr().out
    assert "1 of 4 checks passed" in shown and "seven is not eight" in shown and "timed out" in shown
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".log", ""}, "something is left behind"


def test_what_has_an_outcome_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.open('a').write('x')"
    checks = [_check(name, count, str(tmp_path / f"{name}.count")) for name in ("first", "second")]

    def runs() -> list[int]:
        return [len(path.read_text()) if path.exists() else 0 for path in sorted(tmp_path.glob("*.count"))]

    assert _run(tmp_path, checks, "--only", "first") == 0 and runs() == [1]
    assert _run(tmp_path, checks) == 0 and runs() == [1, 1]
    assert "passed (earlier)" in capsys.readouterr().out
    assert _run(tmp_path, checks, "--only", "second", "--again") == 0 and runs() == [1, 2]
    # What a rehearsal found says nothing about a GPU, and the other way round.
    outcome = _outcome(tmp_path, "first") | {"rehearsal": False}
    (tmp_path / "first.json").write_text(json.dumps(outcome))
    assert _run(tmp_path, checks) == 0 and runs() == [2, 2]


def test_a_failure_of_an_earlier_call_is_still_one(tmp_path: Path) -> None:
    checks = [_check("fails", "raise SystemExit(1)")]
    assert [_run(tmp_path, checks), _run(tmp_path, checks)] == [1, 1]


def test_a_suite_that_is_stopped_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    child, main = tmp_path / "child", "import sys; from tests.unit.test_gpu_suite import stopped; stopped(sys.argv[1])"
    suite = subprocess.Popen([sys.executable, "-c", main, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()):
        assert suite.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    suite.terminate()
    assert suite.wait(timeout=30) == 128 + signal.SIGTERM
    assert _ends(int(child.read_text()))
    assert [path.name for path in tmp_path.glob("*.json")] == ["first.json"]


def stopped(folder: str) -> None:
    """The command of the test above: the second check hangs."""
    checks = (_check("first", "pass"), _check("second", HANGS, str(Path(folder) / "child"), seconds=300.0))
    options = gpu_suite.parse_arguments(["--rehearse", "--results", folder])
    sys.exit(main_guard(run_suite)(options, checks))


def test_wrong_choices_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match="--only speed: no such check; choose from environment, dispatch"):
        chosen_checks(["speed"], CHECKS, None)
    with pytest.raises(UserError, match=r"no GPU here.*--rehearse"):
        chosen_checks([], CHECKS, 0)
    with pytest.raises(UserError, match="--only nccl: needs 2 GPUs, this machine has 1"):
        chosen_checks(["nccl"], CHECKS, 1)


def test_one_gpu_runs_all_but_what_needs_more_which_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    chosen, left_out = chosen_checks([], CHECKS, 1)
    assert [check.name for check in left_out] == ["nccl"] and len(chosen) == len(CHECKS) - 1
    gpu_suite.Console(width=gpu_suite.LOG_WIDTH).print(gpu_suite.table_of([], [], left_out))
    assert "not run: needs 2 GPUs" in capsys.readouterr().out
    assert chosen_checks([], CHECKS, 2) == (list(CHECKS), [])


def test_one_gpu_takes_less_than_nine_minutes() -> None:
    assert sum(check.seconds for check in CHECKS if check.gpus == 1) < 9 * 60


def test_every_file_of_tests_is_a_check() -> None:
    files = {path.name.removeprefix("test_").removesuffix(".py") for path in (ROOT / "tests/gpu").glob("test_*.py")}
    named = {check.name: check.command[-1] for check in CHECKS if "pytest" in check.command}
    assert named == {name: f"tests/gpu/test_{name}.py" for name in files}


def test_the_page_names_every_check_with_its_limit_and_the_waits() -> None:
    # Here, for the suite that is stopped above imports this file, and nothing that takes long.
    from tests.gpu.test_synchronisation import MOST_IN_A_LAYER, MOST_IN_A_STEP

    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z]+) \| (\d+) \|", page, re.MULTILINE)
    assert rows == [(check.name, f"{check.seconds:g}") for check in CHECKS]
    layer, step = MOST_IN_A_LAYER, MOST_IN_A_STEP
    assert (layer["local"], layer["gather"], step[1]) == (0, 0, step[2])
    waits = f"0 times in a layer (`alltoall`: {layer['alltoall']}), {step[0]} times in a step at ZeRO 0, {step[1]} at"
    assert waits in page


def test_every_check_is_there() -> None:
    for check in CHECKS:
        flag, *words = check.command
        assert flag == "-m"
        file = words[-1] if words[0] == "pytest" else f"{words[0].replace('.', '/')}.py"
        assert (ROOT / file).is_file(), check.name
