"""Progress of long work: lines in a log, a bar on a terminal, nothing on a quiet console."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mome_dist import progress as progress_module
from mome_dist.progress import BYTES, progress, stages, track

ROOT = Path(__file__).resolve().parents[2]


class _Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def _log() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=20), file


def test_a_log_has_the_first_step_a_line_a_minute_and_the_end(clock: _Clock) -> None:
    console, file = _log()
    with progress(console, "training", 1000, start=200, unit="steps") as shown:
        for step in range(201, 1001):
            clock.now += 1
            shown.update(step, f"loss {step / 100:.3f}", "500 tokens/s")
    lines = file.getvalue().splitlines()
    assert lines[0] == "training: 201 of 1,000 steps (20 %), loss 2.010, 500 tokens/s, 0:00:01 so far"
    assert lines[1].startswith("training: 261 of 1,000 steps (26 %), loss 2.610")
    assert lines[-1] == "training: 1,000 of 1,000 steps (100 %), loss 10.000, 500 tokens/s, 0:13:20 so far"
    assert lines[1].endswith("0:01:01 so far, 0:12:19 left")
    assert len(lines) == 1 + 13 + 1


def test_a_slow_first_step_does_not_foretell_the_rest(clock: _Clock) -> None:
    console, file = _log()
    with progress(console, "x", 101, every=0) as shown:
        clock.now += 20  # programs start
        for _ in range(2):
            clock.now += 1
            shown.advance()
    assert file.getvalue().splitlines() == [
        "x: 1 of 101 (1 %), 0:00:21 so far",
        "x: 2 of 101 (2 %), 0:00:22 so far, 0:01:39 left",
    ]


def test_the_interval_may_be_none_at_all(clock: _Clock) -> None:
    console, file = _log()
    with progress(console, "x", 5, every=0) as shown:
        for _ in range(5):
            shown.advance()
            shown.update(shown.done)  # the same again says nothing new
    assert [line.split(" of")[0] for line in file.getvalue().splitlines()] == [f"x: {n}" for n in range(1, 6)]


def test_bytes_are_told_in_gigabytes_and_a_total_may_come_later(clock: _Clock) -> None:
    console, file = _log()
    with progress(console, "writing", unit=BYTES) as shown:
        clock.now += 2
        shown.update(500_000_000, total=2_000_000_000)
    assert file.getvalue() == "writing: 0.50 GB of 2.00 GB (25 %), 0:00:02 so far\n"


def test_items_are_counted_when_they_are_dealt_with(clock: _Clock) -> None:
    console, file = _log()
    for _item in track("abc", "reading", console, every=0):
        assert file.getvalue().count("\n") == "abc".index(_item)
    assert file.getvalue().splitlines()[-1].startswith("reading: 3 of 3 (100 %)")


def test_a_quiet_console_and_none_show_nothing() -> None:
    file = io.StringIO()
    for console in (None, Console(file=file, quiet=True)):
        assert list(track([1, 2], "x", console, every=0)) == [1, 2]
    assert file.getvalue() == ""


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=True, width=120), "training", 3, unit="steps", every=0) as shown:
        shown.update(3, "loss 1.000")
    text = file.getvalue()
    assert "━" in text and "3/3" in text and "loss 1.000" in text and "so far" not in text


def test_stages_are_lines_in_a_log() -> None:
    console, file = _log()
    with stages(console, "starting") as show:
        show("fault 1 of 2: a name that is longer than the log is wide")
    assert file.getvalue() == "starting\nfault 1 of 2: a name that is longer than the log is wide\n"


def test_everything_that_takes_long_goes_through_this_module() -> None:
    pattern = re.compile(r"rich\.(progress|status)|\.status\(")
    sources = [path for folder in ("mome_dist", "launchers", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == ["progress.py"]
