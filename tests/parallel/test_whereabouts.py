"""Every collective has the configured timeout, and a rank that is late, stopped or dead is named by the others."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from mome_dist.config import load_config
from mome_dist.errors import RankLostError, UserError
from mome_dist.exit_codes import RANK_LOST
from mome_dist.parallel import whereabouts
from mome_dist.parallel.forked import fork_ranks
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.rendezvous import STORE_SECONDS, join
from mome_dist.parallel.whereabouts import report, wait_for_all
from mome_dist.preflight import validate
from mome_dist.training import loop
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world
from tests.patience import patience

TIMEOUT = min(round(patience(4)), 20)  # seconds: ranks of a busy machine meet within it


def _timeouts_of_a_run(overrides: list[str], cache: Path) -> list[float]:
    """Timeouts (s) of all process groups of this rank at its first step: torch's, Megatron's and DeepSpeed's."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    found: list[float] = []
    forward_backward = loop.forward_backward

    def looking(*args: Any, **kwargs: Any) -> Any:
        for group in dist.distributed_c10d._world.pg_map:
            found.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        return forward_backward(*args, **kwargs)

    loop.forward_backward = looking
    config = load_config(overrides)
    loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return found


def test_every_group_of_a_run_has_the_configured_timeout(lab: Lab, tmp_path: Path) -> None:
    overrides = lab.overrides(
        tmp_path, "training.steps=1", "parallel.ep=2", "parallel.tp=2", "parallel.timeout_seconds=77"
    )
    for found in run_world(_timeouts_of_a_run, 4, overrides, lab.cache):
        assert len(found) > 10 and set(found) == {77.0}


def test_torch_gives_groups_half_an_hour_unless_told(tmp_path: Path) -> None:
    # What the test above guards against: torch does not hand the default group's timeout on.
    assert run_world(_plain_group_timeout, 1) == [1800.0]


def _plain_group_timeout() -> float:
    join("gloo", 60)
    return dist.new_group([0])._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def _train_and_suffer(fault: str, victim: int, size: int, folder: Path) -> int:
    """A loop like training's in which something happens to one rank in step 4; writes what this rank raised."""
    rank, began, told = int(os.environ["RANK"]), time.monotonic(), ""
    look_up = whereabouts.Whereabouts._look_up

    def looking(*args: Any) -> Any:
        seen = look_up(*args)
        (folder / f"looked-{rank}").touch()
        return seen

    whereabouts.Whereabouts._look_up = looking  # type: ignore[method-assign,assignment]
    try:
        with parallel_world(Layout.for_world(size), 0, TIMEOUT):
            for step in range(6):
                report("reading the batch", step)
                if (rank, step) == (victim, 3):
                    began = time.monotonic()
                    _suffer(fault, folder)
                report("forward and backward", step)
                began = time.monotonic()
                dist.all_reduce(torch.ones(8))
    except (RankLostError, UserError) as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps([told, time.monotonic() - began]))
    return 0


def _suffer(fault: str, folder: Path) -> None:
    if fault == "sleep":
        time.sleep(TIMEOUT + patience(6))
    elif fault == "late":  # comes as soon as the others have begun to look for it
        while len(list(folder.glob("looked-*"))) < 2:
            time.sleep(0.02)
    elif fault == "error":
        raise ValueError("the disk is on fire")
    elif fault == "user error":
        raise UserError("shard 7 is damaged")
    else:
        time.sleep(patience(0.5))  # others may not have left the collective before
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def _verdicts(fault: str, victim: int, folder: Path, size: int = 3) -> list[str]:
    """What each surviving rank says, and that it says it in time."""
    folder.mkdir(exist_ok=True)
    ranks = fork_ranks(_train_and_suffer, size, fault, victim, size, folder)
    try:
        assert [rank.wait() for number, rank in enumerate(ranks) if number != victim] == [0] * (size - 1)
    finally:
        os.kill(ranks[victim].pid, signal.SIGKILL)
        ranks[victim].wait()
    told = []
    for rank in (rank for rank in range(size) if rank != victim):
        text, seconds = json.loads((folder / f"{rank}.json").read_text())
        # The timeout, the observation, and as much again for a busy machine.
        assert seconds < patience(2 * (TIMEOUT + whereabouts.OBSERVE_SECONDS))
        told.append(text)
    return told


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_rank_without_a_heartbeat_is_named_by_all_others(tmp_path: Path, fault: str) -> None:
    for rank, told in zip((0, 2), _verdicts(fault, 1, tmp_path), strict=True):
        assert re.match(r"RankLostError: rank 1 \(.+\) is silent: in step 4, 'reading the batch', since \d\d:", told)
        assert f"Rank {rank} (" in told and "in step 4, 'forward and backward'" in told
        assert f"parallel.timeout_seconds={TIMEOUT}" in told


def test_the_rank_that_holds_the_store_may_be_the_one_that_dies(tmp_path: Path) -> None:
    for told in _verdicts("kill", 0, tmp_path):
        assert "rank 0's process, or its host 127.0.0.1, is gone or hangs" in told


def test_the_rank_that_holds_the_store_may_be_the_one_that_hangs(tmp_path: Path) -> None:
    for told in _verdicts("stop", 0, tmp_path):
        assert "rank 0's process, or its host 127.0.0.1, is gone or hangs" in told


@pytest.mark.parametrize("fault", ["sleep", "late"])
def test_a_slow_rank_is_named_by_its_place(tmp_path: Path, fault: str) -> None:
    for told in _verdicts(fault, 2, tmp_path):
        assert re.match(r"RankLostError: rank 2 \(.+\) is behind: in step 4, 'reading the batch', since", told)


def test_an_error_of_one_rank_is_told_by_all(tmp_path: Path) -> None:
    for told in _verdicts("error", 0, tmp_path / "error"):
        assert re.match(r"RankLostError: rank 0 \(.+\) stopped: ValueError: the disk is on fire; in step 4", told)
    for told in _verdicts("user error", 0, tmp_path / "user"):
        assert re.match(r"UserError: rank 0 \(.+\): shard 7 is damaged$", told)


def _hang(folder: Path) -> int:
    """Rank 1 hangs outside of any collective, where no collective's timeout ends it; rank 0 waits for it, patiently."""
    whereabouts.GLOO_SLACK_SECONDS = 1.0
    with parallel_world(Layout.for_world(2), 0, TIMEOUT):
        if os.environ["RANK"] == "1":
            report("reading the batch", 0)
            time.sleep(60)
        report("reading the batch", 0, patient=True)
        time.sleep(60)
    return 0


def test_a_rank_that_hangs_by_itself_ends_itself(tmp_path: Path) -> None:
    ranks = fork_ranks(_hang, 2, tmp_path, logs=tmp_path)
    assert ranks[1].wait() == RANK_LOST
    os.kill(ranks[0].pid, signal.SIGKILL)
    ranks[0].wait()
    assert "Rank 1" in (tmp_path / "rank-1.log").read_text()


def _join_late(folder: Path) -> int:
    if os.environ["RANK"] == "1":
        return 0
    try:
        join("gloo", 1.0)
    except RankLostError as error:
        (folder / os.environ["RANK"]).write_text(str(error))
    return 0


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    assert [rank.wait() for rank in fork_ranks(_join_late, 3, tmp_path)] == [0, 0, 0]
    assert "1 of 3 ranks did not come to 127.0.0.1:" in (tmp_path / "0").read_text()
    assert "within 1 s: 1." in (tmp_path / "0").read_text()


def _stopped_keeper() -> psutil.Process | None:
    """Stop rank 0, which keeps the store, until rank 1 resumes what it is given here; rank 0 is given None then."""
    processes: list[int] = [0, 0]
    dist.all_gather_object(processes, os.getpid())
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    keeper = psutil.Process(processes[0])
    while keeper.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    return keeper


def _report_to_a_stopped_store() -> None:
    """Rank 1 reports while rank 0 is stopped; rank 0 goes on when rank 1 has done so."""
    with parallel_world(Layout.for_world(2), 0, 60):
        if (keeper := _stopped_keeper()) is not None:
            for step in range(100):
                report("forward and backward", step)
            keeper.resume()


def test_a_report_waits_for_no_answer() -> None:
    run_world(_report_to_a_stopped_store, 2, timeout=60)


def _look_into_a_store_that_answers_late() -> None:
    """Rank 0 is stopped for longer than most answers may take; what it says then still counts."""
    with parallel_world(Layout.for_world(2), 0, 60):
        if (keeper := _stopped_keeper()) is not None:
            threading.Timer(STORE_SECONDS + 1, keeper.resume).start()
            assert (here := whereabouts._current) is not None and here._look_up() is not None


def test_a_store_that_answers_late_is_not_taken_for_a_lost_one() -> None:
    run_world(_look_into_a_store_that_answers_late, 2, timeout=60)


def _wait_beside_a_stopped_store() -> None:
    """Rank 0 is stopped for longer than a collective may take, and then goes on."""
    with parallel_world(Layout.for_world(2), 0, TIMEOUT):
        if (keeper := _stopped_keeper()) is not None:
            threading.Timer(2 * TIMEOUT, keeper.resume).start()
        wait_for_all("building the model")


def test_waiting_for_all_outlasts_a_store_that_answers_late() -> None:
    # A machine with more ranks than cores is late in answering a connection, too.
    run_world(_wait_beside_a_stopped_store, 2, timeout=60)


def _cost_of_a_report(_: Path) -> float:
    """Seconds that this rank works for one report, the best of ten rounds: others may use its core meanwhile."""
    with parallel_world(Layout.for_world(2), 0, 60):
        rounds = []
        for _round in range(10):
            began = time.thread_time()
            for step in range(100):
                report("forward and backward", step)
            rounds.append((time.thread_time() - began) / 100)
        dist.barrier()
    return min(rounds)


def test_reports_cost_next_to_nothing(tmp_path: Path) -> None:
    # Six places a step at 100 us each are under 1 % of a step of 60 ms, the shortest that the small test model has.
    assert max(run_world(_cost_of_a_report, 2, tmp_path)) < 100e-6
