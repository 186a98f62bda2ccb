"""The local launcher, with real processes: environment, exit codes, ends of groups, signals, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mome_dist.launchers.environment import Machine, own_cores, rank_environment
from mome_dist.launchers.local import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PROBE = "tests.unit.launcher_probe"


def command(nproc: int, *arguments: str, module: str = PROBE) -> list[str]:
    return [sys.executable, "-m", "launchers.local", "--nproc", str(nproc), "--module", module, *arguments]


def run(nproc: int, *arguments: str, module: str = PROBE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(nproc, *arguments, module=module), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def start(nproc: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(nproc, *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie whose parent is gone for good counts as dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def read_pids(folder: Path, pattern: str) -> list[int]:
    return [int(path.read_text(encoding="utf-8")) for path in folder.glob(pattern) if path.stat().st_size]


def test_each_rank_gets_its_place_and_the_same_rendezvous(tmp_path: Path) -> None:
    done = run(3, f"*:write-environment={tmp_path}")
    assert done.returncode == 0, done.stderr
    environments = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1


def test_tuning_fills_gaps_and_leaves_the_users_own_values() -> None:
    machine = Machine(2, own_cores(), len(own_cores()))
    bare = rank_environment(0, machine, 1234, {})
    assert bare["OMP_NUM_THREADS"] == str(max(1, len(own_cores()) // 2))
    assert bare["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in rank_environment(0, replace(machine, gpus=["0000:17:00.0"]), 1234, {})
    own = rank_environment(1, machine, 1234, {"OMP_NUM_THREADS": "7", "RANK": "9", "HF_HUB_OFFLINE": "0"})
    assert (own["OMP_NUM_THREADS"], own["HF_HUB_OFFLINE"], own["RANK"]) == ("7", "0", "1")


def test_ranks_on_cpus_keep_the_memory_of_large_tensors() -> None:
    code = """
import resource
faults = []
for _ in range(3):
    memory = bytearray(64 << 20)
    memory[:: 4096] = b"1" * len(memory[:: 4096])
    del memory
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""
    machine = Machine(1, own_cores(), len(own_cores()))
    base = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    for environment, kept in ((base, False), (rank_environment(0, machine, 1234, base), True)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert (int(done.stdout) < 1000) is kept, "pages that the kernel gave anew, of 16384"


def test_unknown_options_and_all_after_the_dashes_go_to_the_module() -> None:
    options, rest = parse_arguments(["--nproc", "2", "--corpus", "a b", "x=1", "--", "--timeout", "3"])
    assert (options.nproc, options.timeout) == (2, None)
    assert rest == ["--corpus", "a b", "x=1", "--timeout", "3"]


def test_keys_and_options_are_the_same_and_options_win() -> None:
    options, rest = parse_arguments(["launcher.tasks_per_node=3", "launcher.restarts=2", "--restarts", "1", "x=1"])
    assert (options.nproc, options.restarts, options.timeout, rest) == (3, 1, None, ["x=1"])


def test_a_dry_run_prints_the_command_of_every_rank(tmp_path: Path) -> None:
    done = run(2, "--dry-run", f"*:write-pid={tmp_path}")
    assert done.stdout.endswith(f"-m {PROBE} '*:write-pid={tmp_path}'\n") and not list(tmp_path.iterdir())


def test_rank_0_speaks_on_the_terminal_and_others_into_their_logs(tmp_path: Path) -> None:
    done = run(2, "--log-dir", str(tmp_path), "0:say=zero", "1:say=one")
    assert done.returncode == 0
    assert done.stdout == "zero\n"
    assert (tmp_path / "rank-1.log").read_text(encoding="utf-8") == "one\n"


def test_the_first_failure_ends_the_others_and_gives_the_code_and_the_log(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(3, f"*:write-pid={tmp_path}", "1:say=what went wrong", "1:exit=7", "*:sleep=120")
    assert done.returncode == 7
    assert time.monotonic() - began < 30
    assert "rank 1 failed first, with exit code 7" in done.stderr
    assert "what went wrong" in done.stderr
    assert not any(is_alive(pid) for pid in read_pids(tmp_path, "*.pid"))


def test_a_rank_that_dies_of_a_signal_counts_as_failed() -> None:
    assert run(2, "1:kill-self=9", "*:sleep=120").returncode == 128 + 9


def test_a_user_error_is_told_once() -> None:
    done = run(3, "*:user-error=the key x is 3: use 4")
    assert done.returncode == 2
    assert done.stderr == "error: the key x is 3: use 4\n"


def test_a_user_error_of_one_rank_is_not_lost() -> None:
    done = run(2, "1:user-error=shard 5 is damaged", "0:sleep=120")
    assert done.returncode == 2
    assert "[rank 1] error: shard 5 is damaged" in done.stderr


def test_a_rank_with_an_error_of_its_own_is_the_cause_though_others_lost_it_earlier() -> None:
    done = run(2, "1:exit=76", "0:sleep=1", "0:exit=3")
    assert done.returncode == 3
    assert "rank 0 failed first, with exit code 3" in done.stderr


def test_timeout_ends_everything_with_124(tmp_path: Path) -> None:
    done = run(2, "--timeout", "2", f"*:write-pid={tmp_path}", "*:sleep=120")
    assert done.returncode == 124
    assert "no end after 2 s" in done.stderr
    pids = read_pids(tmp_path, "*.pid")
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_children_of_ranks_end_with_them(tmp_path: Path) -> None:
    assert run(2, f"*:start-child={tmp_path}").returncode == 0
    children = read_pids(tmp_path, "*.child")
    assert len(children) == 2
    wait_until(lambda: not any(map(is_alive, children)))


def test_no_orphans_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher = start(2, "*:ignore-sigterm", f"*:write-pid={tmp_path}", "*:sleep=120")
    wait_until(lambda: len(read_pids(tmp_path, "*.pid")) == 2)
    pids = read_pids(tmp_path, "*.pid")
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_no_folder_is_left_that_the_user_was_not_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run(2, "*:exit=0")
    run(1, "*:exit=3")
    run(2, "*:user-error=wrong")
    launcher = start(2, f"*:write-pid={tmp_path}", "*:sleep=120")
    wait_until(lambda: len(read_pids(tmp_path, "*.pid")) == 2)
    launcher.terminate()
    launcher.communicate()
    assert not list(temporary.iterdir())
    told = run(2, "1:user-error=wrong", "*:sleep=120").stderr
    [kept] = temporary.iterdir()
    assert told.endswith(f"launcher: the logs of the other ranks are in {kept}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_launcher_ends_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start(2, f"*:write-pid={tmp_path}", "*:sleep=120")
    wait_until(lambda: len(read_pids(tmp_path, "*.pid")) == 2)
    pids = read_pids(tmp_path, "*.pid")
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode in (128 + number, 130)
    assert not any(map(is_alive, pids))


def test_usr1_reaches_every_rank_once_and_ranks_may_end_well(tmp_path: Path) -> None:
    launcher = start(2, f"*:note-usr1={tmp_path}", "*:sleep=120")
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    os.kill(launcher.pid, signal.SIGUSR1)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    assert read_pids(tmp_path, "*.signal") == [signal.SIGUSR1, signal.SIGUSR1]


def test_a_crash_and_a_preemption_are_started_again_on_a_new_port(tmp_path: Path) -> None:
    done = run(
        2,
        "--restarts",
        "3",
        f"1:exit-once={tmp_path}/crash:9",
        "0:sleep=1",
        f"0:exit-once={tmp_path}/preempted:75",
        "*:sleep=1",
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 failed first, with exit code 9 (crashed); starting again, restart 1 of 3" in done.stderr
    assert "rank 0 failed first, with exit code 75 (preempted); starting again, restart 2 of 3" in done.stderr
    assert "restart 3" not in done.stderr
    ports = (tmp_path / "crash").read_text().split() + (tmp_path / "preempted").read_text().split()
    assert len(set(ports)) == 2


def test_restarts_are_counted_and_mistakes_are_final(tmp_path: Path) -> None:
    crashing = run(2, "--restarts", "2", "1:exit=9", "*:sleep=60")
    assert (crashing.returncode, crashing.stderr.count("starting again")) == (9, 2)
    mistaken = run(2, "--restarts", "2", "*:user-error=x is 3")
    assert (mistaken.returncode, mistaken.stderr) == (2, "error: x is 3\n")
    none = run(2, "--restarts", "-1")
    assert none.returncode == 2 and "--restarts is -1" in none.stderr


def test_a_launcher_that_was_told_to_stop_does_not_start_again(tmp_path: Path) -> None:
    launcher = start(2, "--restarts", "3", f"*:write-pid={tmp_path}", "*:sleep=120")
    wait_until(lambda: len(read_pids(tmp_path, "*.pid")) == 2)
    launcher.send_signal(signal.SIGTERM)
    _, told = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "starting again" not in told


def test_mistakes_are_found_before_anything_starts(tmp_path: Path) -> None:
    absent = run(2, module="mome_dist.no_such_module")
    assert (absent.returncode, absent.stderr.count("error: ")) == (2, 1)
    assert "mome_dist.no_such_module" in absent.stderr
    none = run(0, f"*:write-pid={tmp_path}")
    assert none.returncode == 2
    assert "--nproc is 0" in none.stderr
    assert not list(tmp_path.iterdir())
