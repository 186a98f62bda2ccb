"""Work for the next step beside the current one: in order, on another thread, its errors where its step is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from mome_dist.errors import UserError
from mome_dist.training.ahead import Ahead


@pytest.fixture
def ahead() -> Iterator[Ahead[str]]:
    worker = Ahead[str](torch.device("cpu"))
    yield worker
    worker.close()


def never() -> str:
    raise AssertionError("was begun already")


def test_work_runs_while_its_caller_does_something_else(ahead: Ahead[str]) -> None:
    running, go_on = threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        assert go_on.wait(30)
        return threading.current_thread().name

    ahead.begin(1, work)
    assert running.wait(30), "it begins by itself"
    go_on.set()
    assert ahead.take(1, never).startswith("ahead")


def test_a_step_that_was_not_begun_is_done_at_once(ahead: Ahead[str]) -> None:
    def here() -> str:
        return threading.current_thread().name

    assert ahead.take(0, here) == threading.current_thread().name
    ahead.begin(1, here)
    assert ahead.take(1, never) != threading.current_thread().name
    assert ahead.take(2, here) == threading.current_thread().name


def test_an_error_is_raised_when_its_step_comes(ahead: Ahead[str]) -> None:
    def fail() -> str:
        raise UserError("s.tar: a.flac: cannot decode")

    ahead.begin(1, fail)
    with pytest.raises(UserError, match=r"a\.flac"):
        ahead.take(1, never)


def test_steps_cannot_be_mixed_up(ahead: Ahead[str]) -> None:
    ahead.begin(1, lambda: "one")
    with pytest.raises(AssertionError, match="at a time"):
        ahead.begin(2, lambda: "two")
    with pytest.raises(AssertionError, match="follow each other"):
        ahead.take(2, never)


def test_closing_waits_for_what_runs() -> None:
    worker, done, running = Ahead[str](torch.device("cpu")), [], threading.Event()

    def work() -> str:
        running.set()
        time.sleep(0.2)
        done.append(True)
        return ""

    worker.begin(1, work)
    assert running.wait(30)
    worker.close()
    assert done == [True]
