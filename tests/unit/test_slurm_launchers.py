"""What the Slurm launchers decide, without a cluster: records of tries, judgements of nodes, environments of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mome_dist.errors import UserError
from mome_dist.exit_codes import PREEMPTED
from mome_dist.launchers.environment import Machine
from mome_dist.launchers.options import LocalOptions, SlurmOptions, SubmititOptions, load_options, parse_arguments
from mome_dist.launchers.slurm import tries
from mome_dist.launchers.slurm.job import Job, job_port
from mome_dist.launchers.slurm.preflight import NodesError, compare, describe_node
from mome_dist.launchers.slurm.rank import task_environment
from mome_dist.launchers.slurm.tries import Record
from mome_dist.launchers.submitit.rank import run_child
from mome_dist.launchers.submitit.sweep import combinations
from mome_dist.paths import configs_dir

NODES = ["node1", "node2"]


def record(folder: Path, *ends: tuple[str, int, int]) -> Record:
    """A record of tries: why each ended, and the steps saved before and after."""
    made = Record(folder, "7", "mome_dist.train", [])
    for reason, first, last in ends:
        made.begin(NODES, first)
        made.end(reason, 75, last, "waiting")
    return made


@pytest.mark.parametrize(
    ("ends", "failures"),
    [
        ([], 0),
        ([("rank 1: Killed", 0, 0)], 1),
        ([("rank 1: Killed", 0, 0), ("rank 0: Killed", 0, 0)], 2),
        ([("rank 1: Killed", 0, 0), ("rank 1: Killed", 0, 5), ("rank 1: Killed", 5, 5)], 1),  # the second got further
        ([("rank 1: Killed", 0, 0), (tries.PREEMPTED, 0, 0), (tries.NODE_LOST, 0, 0), (tries.TIME_LIMIT, 0, 0)], 2),
        ([(tries.PREEMPTED, 0, 0)] * 9, 0),  # the cluster's doing
    ],
)
def test_only_failures_without_progress_count(tmp_path: Path, ends: list[tuple[str, int, int]], failures: int) -> None:
    assert record(tmp_path, *ends).failures_without_progress() == failures


def test_a_record_goes_on_after_a_requeue_and_notes_what_nobody_saw(tmp_path: Path) -> None:
    first = record(tmp_path, (tries.TIME_LIMIT, 0, 10))
    first.begin(NODES, 10)  # and then the node was gone
    second = Record.open(tmp_path, "7", "mome_dist.train", [])
    second.close_unfinished(["REQUEUED", "NODE_FAIL", "RUNNING"], 15)
    assert second.begin(["node3", "node4"], 15).number == 3
    second.end(tries.FINISHED, 0, 20, "finished")
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["reason"] for entry in saved["tries"]] == ["time limit", "node failed", "finished"]
    assert (saved["state"], saved["exit_code"], saved["tries"][1]["exit_code"]) == ("finished", 0, None)
    assert "try 2" in second.table() and "steps 10 -> 15  node failed" in second.table()


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"JobState": "CANCELLED", "PreemptTime": "None"}, tries.CANCELLED),
        ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T00:00:00"}, tries.PREEMPTED),
        ({"JobState": "PENDING", "PreemptTime": "None"}, tries.REQUEUED),
        ({"JobState": "RUNNING", "EndTime": "2020-01-01T00:00:00"}, tries.TIME_LIMIT),
        ({"JobState": "RUNNING", "EndTime": "Unknown"}, tries.ASKED),
    ],
)
def test_why_a_job_was_stopped(known: dict[str, str], reason: str) -> None:
    assert tries.why_stopped(known) == reason


@pytest.mark.parametrize("reason", ["launch_failed_requeued_held", "JobHeldUser", "JobHeldAdmin"])
def test_a_held_job_is_named_with_its_reason_and_the_command_that_releases_it(tmp_path: Path, reason: str) -> None:
    known = {"JobState": "COMPLETING", "Reason": reason, "Priority": "0"}
    made = record(tmp_path)
    made.begin(NODES, 0)
    made.end(tries.REQUEUED, 75, 10, "waiting", known)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert (saved["state"], saved["held"], saved["release"]) == ("waiting", reason, "scontrol release 7")
    assert f"job 7: waiting, held by Slurm ({reason}) until `scontrol release 7`" in made.table()
    made.begin(NODES, 10)  # it was released
    made.end(tries.REQUEUED, 75, 10, "waiting", {"JobState": "PENDING", "Reason": "BeginTime", "Priority": "42"})
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert (saved["held"], saved["release"]) == (None, None)


def reports(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What two nodes say of a shared folder, and what lies in it then."""
    (folder / "token").write_text("t")
    said = []
    for node in NODES:
        os.environ["SLURMD_NODENAME"] = node
        said.append(describe_node(folder))
    return said, {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], dict[str, str]]:
    monkeypatch.setenv("SLURMD_NODENAME", "")
    return reports(tmp_path)


def test_equal_nodes_pass(pair: tuple[list[dict[str, Any]], dict[str, str]]) -> None:
    compare(*pair, NODES, 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("torch", "2.12.0", "node node2 has torch 2.12.0, the others have"),
        ("mome_dist", "9", "node node2 has mome_dist 9"),
        ("token", None, "node node2 cannot share the output directory"),
        ("error", "Read-only file system (x)", "Read-only file system"),
        ("gpus", 1, "node node2 has 1 visible GPUs for 2 ranks"),
        ("gpus", 0, "node node2 has 0 visible GPUs for 2 ranks"),  # its driver is broken: no rank may use the CPU
    ],
)
def test_the_node_that_differs_is_named(
    pair: tuple[list[dict[str, Any]], dict[str, str]], key: str, value: Any, message: str
) -> None:
    said, written = pair
    if key == "gpus":
        said[0][key] = 2
    said.insert(0, dict(said[0]))  # a majority
    said[-1][key] = value
    with pytest.raises(UserError, match=message):
        compare(said, written, ["node1", *NODES], 2)


def test_ranks_may_share_a_gpu_over_gloo(pair: tuple[list[dict[str, Any]], dict[str, str]]) -> None:
    said, written = pair
    for report in said:
        report["gpus"] = 1
    compare(said, written, NODES, 8, may_share=True)
    with pytest.raises(UserError, match=r"has 1 visible GPUs for 8 ranks: .*MOME_DIST_BACKEND=gloo"):
        compare(said, written, NODES, 8)


def test_a_node_that_says_nothing_asks_for_others(pair: tuple[list[dict[str, Any]], dict[str, str]]) -> None:
    with pytest.raises(NodesError, match="1 of 2 nodes answered"):
        compare(pair[0][:1], pair[1], NODES, 2)


def test_a_task_becomes_a_rank() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    cores = frozenset(range(8))
    four, one = (Machine(4, cores, 8, [f"0000:{n}:00.0" for n in range(count)]) for count in (4, 1))
    rank = task_environment({**slurm, "OMP_NUM_THREADS": "3"}, four)
    assert [rank[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["5", "8", "1", "4"]
    assert rank["OMP_NUM_THREADS"] == "3" and "NCCL_SOCKET_IFNAME" not in rank and "GLOO_SOCKET_IFNAME" not in rank
    told = task_environment({**slurm, "MOME_DIST_INTERFACE": "ib0"}, four)
    assert told["NCCL_SOCKET_IFNAME"] == told["GLOO_SOCKET_IFNAME"] == "ib0"
    assert task_environment({**slurm, "SLURM_GPUS_ON_NODE": "4"}, one)["LOCAL_RANK"] == "0"  # --gpus-per-task
    assert task_environment({**slurm, "SLURM_GPUS_ON_NODE": "16"}, four)["LOCAL_RANK"] == "0"  # four for each
    assert task_environment({**slurm, "SLURM_GPUS_ON_NODE": "4"}, four)["LOCAL_RANK"] == "1"
    assert task_environment({**slurm, "SLURM_GPUS_ON_NODE": "1"}, one)["LOCAL_RANK"] == "1"  # they share it


def test_jobs_use_different_ports() -> None:
    ports = {job_port(str(job)) for job in range(100, 140)}
    assert len(ports) == 40 and all(20000 <= port < 32000 for port in ports)


def test_outside_of_a_job_the_scripts_say_how_to_submit() -> None:
    with pytest.raises(UserError, match="submit one of slurm"):
        Job.from_environment({})


def test_keys_of_a_launcher_and_of_a_run_are_told_apart() -> None:
    given = ["experiment=tiny", "launcher.nodes=2", "tasks_per_node=4", "name=x", "launcher.extra=[--exclusive]"]
    request = parse_arguments("slurm", "", SlurmOptions, given, sweeps=False)
    assert request.arguments == ["experiment=tiny", "name=x"]
    options = load_options("slurm", SlurmOptions, request)
    assert (options.nodes, options.tasks_per_node, options.world_size, options.extra) == (2, 4, 8, ["--exclusive"])


@pytest.mark.parametrize(
    ("word", "message"),
    [("launcher.nodes=0", "at least 1"), ("launcher.nods=1", "nods"), ("launcher.nodes=two", "'nodes'.*'two'")],
)
def test_wrong_keys_of_a_launcher_are_named(word: str, message: str) -> None:
    request = parse_arguments("submitit", "", SubmititOptions, [word], sweeps=True)
    with pytest.raises(UserError, match=message):
        load_options("submitit", SubmititOptions, request)


@pytest.mark.parametrize(
    ("name", "schema"), [("local", LocalOptions), ("slurm", SlurmOptions), ("submitit", SubmititOptions)]
)
def test_every_key_of_a_launcher_is_in_its_file(name: str, schema: type[Any]) -> None:
    keys = yaml.safe_load((configs_dir() / f"launcher/{name}.yaml").read_text())
    assert list(keys) and set(keys) == {field.name for field in dataclasses.fields(schema)}


def test_a_sweep_is_every_combination_in_hydras_order() -> None:
    assert combinations(["a=1,2", "b=[3,4]", "c=x,y"]) == [
        *(["a=1", "b=[3,4]", "c=x"], ["a=1", "b=[3,4]", "c=y"]),
        *(["a=2", "b=[3,4]", "c=x"], ["a=2", "b=[3,4]", "c=y"]),
    ]


@pytest.mark.parametrize(("warned", "code"), [(True, PREEMPTED), (False, 128 + signal.SIGKILL)])
def test_a_rank_that_is_warned_before_it_listens_is_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: bool, code: int
) -> None:
    """Like one that has saved; what kills it otherwise is a failure."""
    task = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)

    def act() -> None:
        started = tmp_path / "0.pid"
        while not (started.exists() and started.read_text()):
            time.sleep(0.05)
        if warned:
            os.kill(os.getpid(), signal.SIGUSR2)  # as Slurm warns every process of a task
        else:
            os.kill(int(started.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=act)
    thread.start()
    assert run_child("tests.unit.launcher_probe", [f"0:write-pid={tmp_path}", "0:sleep=60"], {}) == code
    thread.join()
