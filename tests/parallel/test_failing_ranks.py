"""A rank that fails says why at once, and all others end with it, also where nobody else notices, as on NCCL.

NCCL itself is not here. What matters of it is that a waiting rank learns nothing of one that failed, and that process
groups must not be closed after an error. So these worlds exchange through gloo and call it NCCL, and a rank that waits
for a kernel sleeps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mome_dist.config import load_config
from mome_dist.engine.engine import Engine
from mome_dist.errors import PreemptedError, UserError
from mome_dist.exit_codes import PREEMPTED, RANK_LOST
from mome_dist.exit_codes import USER_ERROR as USER_ERROR_CODE
from mome_dist.parallel import initialize, whereabouts
from mome_dist.parallel.forked import fork_ranks, run_forked
from mome_dist.parallel.initialize import parallel_world
from mome_dist.parallel.layout import Layout
from mome_dist.parallel.rendezvous import STORE_SECONDS
from mome_dist.parallel.whereabouts import report, wait_for_all
from mome_dist.preflight import validate
from mome_dist.training import loop
from mome_dist.training.step import StepLosses
from tests.parallel.replicated import Replicated
from tests.parallel.runs import Lab
from tests.parallel.worlds import run_world
from tests.patience import patience

LONG = 300  # seconds: a timeout that no test waits for
SOON = patience(20)  # seconds in which a world must have ended
COLLECTIVE = min(round(patience(4)), 20)  # seconds: ranks of a busy machine meet within it, and a test waits for it


def _call_it_nccl(folder: Path) -> None:
    """Make this process treat gloo as NCCL, and note it if it closes its groups."""
    whereabouts._on_nccl = lambda: True
    close = initialize._close

    def noting() -> None:
        (folder / f"closed-{os.environ['RANK']}").touch()
        close()

    initialize._close = noting


def _ends(main: Callable[..., int], size: int, folder: Path, *args: object) -> tuple[list[int], list[str]]:
    """Exit codes of forked ranks and what each printed; they must come soon."""
    began = time.monotonic()
    ranks = fork_ranks(main, size, folder, *args, logs=folder)
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL) if rank._code is None else None
    assert time.monotonic() - began < SOON
    return codes, [(folder / f"rank-{rank}.log").read_text() for rank in range(size)]


def _fail(folder: Path, victim: int, kind: str) -> int:
    _call_it_nccl(folder)
    with parallel_world(Layout.for_world(3), 0, LONG):
        report("forward and backward", 4)
        if int(os.environ["RANK"]) == victim:
            if kind == "error":
                raise ValueError("the disk is on fire")
            if kind == "user error":
                raise UserError("shard 7 is damaged")
            raise KeyboardInterrupt
        time.sleep(LONG)  # as in a kernel that never finishes
    return 0


@pytest.mark.parametrize("victim", [0, 1])
def test_on_nccl_a_rank_prints_its_traceback_and_leaves_and_all_others_name_it(tmp_path: Path, victim: int) -> None:
    codes, said = _ends(_fail, 3, tmp_path, victim, "error")
    assert codes == [1 if rank == victim else RANK_LOST for rank in range(3)]
    assert "in _fail\n" in said[victim] and said[victim].rstrip().endswith("ValueError: the disk is on fire")
    for rank in {0, 1, 2} - {victim}:
        assert f"error: rank {victim} (" in said[rank]
        assert "stopped: ValueError: the disk is on fire; in step 5, 'forward and backward'" in said[rank]
        assert "Traceback" not in said[rank]
    assert not list(tmp_path.glob("closed-*"))


def test_on_nccl_a_mistake_ends_all_ranks_with_the_same_line(tmp_path: Path) -> None:
    codes, said = _ends(_fail, 3, tmp_path, 1, "user error")
    assert codes == [USER_ERROR_CODE] * 3
    assert said[1] == "[rank 1] error: shard 7 is damaged\n"
    assert said[0].startswith("error: rank 1 (") and said[0].endswith("): shard 7 is damaged\n")
    assert not list(tmp_path.glob("closed-*"))


def _fail_before_all_have_spoken(folder: Path) -> int:
    """Rank 2 is slow in saying its first word; rank 1 makes a mistake meanwhile, which rank 0 has to tell."""
    if os.environ["RANK"] == "2":
        open_store = whereabouts.open_store

        def open_late(timeout_seconds: float, serves: bool = False) -> dist.TCPStore:
            time.sleep(STORE_SECONDS + 1)
            return open_store(timeout_seconds, serves)

        whereabouts.open_store = open_late
    return _fail(folder, 1, "user error")


def test_a_mistake_is_told_also_while_a_rank_has_not_spoken_yet(tmp_path: Path) -> None:
    codes, said = _ends(_fail_before_all_have_spoken, 3, tmp_path)
    assert codes == [USER_ERROR_CODE] * 3
    assert all("shard 7 is damaged" in text for text in said)


def test_on_nccl_ctrl_c_ends_a_rank_with_its_groups_open(tmp_path: Path) -> None:
    codes, _ = _ends(_fail, 3, tmp_path, 2, "interrupt")
    assert codes == [RANK_LOST, RANK_LOST, 130]
    assert not list(tmp_path.glob("closed-*"))


def _stop_as_asked(folder: Path) -> int:
    _call_it_nccl(folder)
    try:
        with parallel_world(Layout.for_world(2), 0, LONG):
            raise PreemptedError("saved after step 3")
    except PreemptedError:
        return PREEMPTED


def test_on_nccl_a_stop_as_asked_closes_its_groups(tmp_path: Path) -> None:
    assert _ends(_stop_as_asked, 2, tmp_path)[0] == [PREEMPTED, PREEMPTED]
    assert len(list(tmp_path.glob("closed-*"))) == 2


def _train(folder: Path, overrides: list[str], cache: Path, fault: str) -> int:
    """Train as on NCCL; rank 1 fails in its third step with gradients on its parameters, and rank 0 waits for it."""
    os.environ["MOME_DIST_CACHE"] = str(cache)
    _call_it_nccl(folder)
    forward_backward, steps, failed = loop.forward_backward, 0, False

    def failing(*args: Any, **kwargs: Any) -> StepLosses:
        nonlocal steps, failed
        steps += 1
        result = forward_backward(*args, **kwargs)
        if steps == 3 and os.environ["RANK"] == "1":
            failed = True
            assert any(parameter.grad is not None for parameter in args[0].trainable_modules().parameters())
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("out of memory in backward")
        return result

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if failed:
                (folder / "reduced").touch()
            return function(*args, **kwargs)

        return call

    loop.forward_backward = failing
    dist.all_reduce, dist.reduce = noting(dist.all_reduce), noting(dist.reduce)
    config = load_config(overrides)
    loop.train(config, validate(config, int(os.environ["WORLD_SIZE"])))
    return 0


@pytest.fixture(scope="module")
def lab(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab.train(2, tmp_path_factory.mktemp("features"), "training.steps=1", ep=2)  # fills the cache of features
    return lab


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_a_rank_that_fails_in_backward_ends_the_run_and_reduces_nothing(lab: Lab, tmp_path: Path, zero: str) -> None:
    overrides = lab.overrides(
        tmp_path / "run", "parallel.ep=2", f"deepspeed={zero}", f"parallel.timeout_seconds={LONG}"
    )
    codes, said = _ends(_train, 2, tmp_path, overrides, lab.cache, "error")
    assert codes == [RANK_LOST, 1]
    assert said[1].rstrip().endswith("ValueError: out of memory in backward")
    assert "rank 1 (" in said[0] and "stopped: ValueError: out of memory in backward; in step 3" in said[0]
    assert not (tmp_path / "reduced").exists() and not list(tmp_path.glob("closed-*"))


def _fail_in_a_step(settings: dict[str, object]) -> bool:
    """One rank fails inside of the reduction context while the other never comes to it."""
    from mome_dist.config.schema import OptimizerConfig

    with parallel_world(Layout.for_world(2), 0, LONG):
        modules = torch.nn.ModuleDict({"projectors": torch.nn.Linear(4, 4)})
        engine = Engine(Replicated(modules), OptimizerConfig(), settings)
        cleared = True
        if os.environ["RANK"] == "1":
            with pytest.raises(ValueError, match="in backward"), engine.accumulate():
                modules["projectors"](torch.ones(2, 4)).sum().backward()
                raise ValueError("in backward")
            cleared = all(parameter.grad is None for parameter in modules.parameters())
            averaged = getattr(engine.deepspeed.optimizer, "averaged_gradients", {})
            cleared &= all(gradients is None for gradients in averaged.values())
        wait_for_all("the failed step")
    return cleared


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failed_step_leaves_no_gradient_and_enters_no_collective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setenv("FOLDER", str(tmp_path))
    # Without reduce_scatter, DeepSpeed reduces even buckets that hold nothing.
    settings = {"zero_optimization": {"stage": stage, "reduce_scatter": False}}
    assert run_world(_fail_in_a_step, 2, settings, timeout=SOON) == [True, True]


def _wait(folder: Path, fault: str) -> int:
    """Rank 0 works for longer than a collective may take; the others wait for it."""
    whereabouts.SILENT_SECONDS = 8.0
    with parallel_world(Layout.for_world(3), 0, COLLECTIVE):
        report("hashing", patient=True)
        if os.environ["RANK"] == "0" and fault == "none":
            time.sleep(2 * COLLECTIVE)
        if os.environ["RANK"] == "1" and fault != "none":
            time.sleep(1)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("no space left")
        wait_for_all("hashing")
        dist.all_reduce(torch.ones(1))
    return 0


def test_a_long_wait_is_not_ended_by_the_timeout_of_collectives(tmp_path: Path) -> None:
    assert _ends(_wait, 3, tmp_path, "none")[0] == [0, 0, 0]


def test_a_rank_that_dies_while_others_wait_for_it_is_named(tmp_path: Path) -> None:
    codes, said = _ends(_wait_telling, 3, tmp_path, "kill")
    assert codes == [RANK_LOST, -signal.SIGKILL, RANK_LOST]
    for rank in (0, 2):
        assert "error: rank 1 (" in said[rank] and "is silent: in 'hashing'" in said[rank]


def test_a_mistake_of_one_rank_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    codes, said = _ends(_wait_telling, 3, tmp_path, "user error")
    assert codes == [USER_ERROR_CODE] * 3
    assert all("no space left" in text for text in said)


def _wait_telling(folder: Path, fault: str) -> int:
    """As a command: errors become exit codes."""
    try:
        return _wait(folder, fault)
    except Exception as error:
        return whereabouts.last_words(error)


def _end_without_a_result() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(LONG)


def test_a_forked_rank_that_ends_without_a_result_is_noticed_at_once() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended with code 7 and no result"):
        run_forked(_end_without_a_result, 2, timeout=SOON)
