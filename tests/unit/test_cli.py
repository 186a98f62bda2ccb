"""`main_guard`: exit codes and what the user reads."""

from __future__ import annotations

import pytest

from mome_dist.cli import main_guard
from mome_dist.errors import UserError, first_line


@main_guard
def act(what: str) -> int | None:
    """Return, or raise, as told."""
    if what == "mistake":
        raise UserError("key optimizer.lr is -1: use a positive number")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "bug":
        raise RuntimeError("a bug")
    return 5 if what == "five" else None


def test_what_main_returns_is_the_exit_code() -> None:
    assert (act("five"), act("nothing")) == (5, 0)


@pytest.mark.parametrize(("rank", "prefix"), [(None, ""), ("0", ""), ("3", "[rank 3] ")])
def test_a_mistake_is_one_line_and_code_2(
    rank: str | None, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert act("mistake") == 2
    assert capsys.readouterr() == ("", f"{prefix}error: key optimizer.lr is -1: use a positive number\n")


def test_interrupts_are_130_and_bugs_keep_their_traceback() -> None:
    assert act("interrupt") == 130
    with pytest.raises(RuntimeError, match="a bug"):
        act("bug")


def test_an_exception_is_told_by_its_first_line_or_its_class() -> None:
    assert first_line(ValueError("\n no room\nfor this")) == "no room"
    assert first_line(AssertionError()) == "AssertionError"
