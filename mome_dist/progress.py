"""How far long work has come: a bar on a terminal, a line now and then in a log.

A log has no use for a bar, which is drawn over itself, and whoever watches an unattended run has nothing but its log.
All that takes long says so through this module, on a `Console` that is quiet on ranks that should be silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

LOG_SECONDS = 60.0  # between two lines in a log
BYTES = "bytes"

T = TypeVar("T")


class Progress:
    """Told how much is done; made by `progress`.

    Attributes:
        done: so far.
    """

    def __init__(self, what: str, total: int | None, start: int, show: Callable[[Progress], None]) -> None:
        self.what, self.total, self.start, self.done = what, total, start, start
        self.figures: tuple[str, ...] = ()
        self.began = time.monotonic()
        self._show = show
        self._first: tuple[float, int] | None = None  # when the first update came, and what was done then

    def update(self, done: int, *figures: str, total: int | None = None) -> None:
        """So much is done; ``figures`` such as "loss 3.141" are shown beside it. ``total`` may be known only now."""
        self.done, self.figures = done, figures
        self.total = self.total if total is None else total
        if self._first is None and done > self.start:
            self._first = time.monotonic(), done
        self._show(self)

    def advance(self) -> None:
        """One more is done."""
        self.update(self.done + 1, *self.figures)

    def left(self) -> float | None:
        """Seconds that the rest will take at the pace so far; None while that cannot be said.

        The pace is that since the first update, before which programs load and caches are cold.
        """
        if self.total is None or self._first is None or self.done <= self._first[1]:
            return None
        moment, done = self._first
        return (time.monotonic() - moment) / (self.done - done) * (self.total - self.done)

    def line(self, unit: str) -> str:
        """Such as ``training: 120 of 400 (30 %), loss 3.141, 0:02:10 so far, 0:05:00 left``."""

        def amount(number: int) -> str:
            return f"{number / 1e9:.2f} GB" if unit == BYTES else f"{number:,}"

        far = amount(self.done)
        if self.total:
            far += f" of {amount(self.total)}{f' {unit}' if unit and unit != BYTES else ''}"
            far += f" ({self.done / self.total:.0%})".replace("%", " %")
        left = self.left()
        times = [f"{_clock(time.monotonic() - self.began)} so far", *([f"{_clock(left)} left"] if left else [])]
        return f"{self.what}: {', '.join([far, *self.figures, *times])}"


@contextmanager
def progress(
    console: Console | None,
    what: str,
    total: int | None = None,
    *,
    start: int = 0,
    unit: str = "",
    every: float = LOG_SECONDS,
) -> Iterator[Progress]:
    """Show how far a piece of work has come while the block lasts.

    Args:
        console: where; None or a quiet one shows nothing.
        what: the work, such as "training".
        total: of what is counted, if it is known.
        start: how much was done before.
        unit: of the count, such as "clips"; `BYTES` are shown in GB.
        every: seconds between two lines where ``console`` is no terminal. The first step and the end have one too.
    """
    if console is None or console.quiet:
        yield Progress(what, total, start, lambda _: None)
    elif console.is_terminal:
        with Bars(*_columns(unit), console=console) as bars:
            bar = bars.add_task(what, total=total, completed=start, figures="")

            def move(now: Progress) -> None:
                bars.update(bar, completed=now.done, total=now.total, figures="  ".join(now.figures))

            yield Progress(what, total, start, move)
    else:
        last, written = -every, -1

        def write(now: Progress) -> None:
            nonlocal last, written
            moment = time.monotonic() - now.began
            if now.done != written and (moment - last >= every or now.done == now.total):
                last, written = moment, now.done
                console.print(now.line(unit), highlight=False, markup=False, soft_wrap=True)

        yield Progress(what, total, start, write)


def track(
    items: Iterable[T],
    what: str,
    console: Console | None,
    total: int | None = None,
    *,
    unit: str = "",
    every: float = LOG_SECONDS,
) -> Iterator[T]:
    """Hand out items and show how many of them are dealt with; see `progress`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(console, what, total, unit=unit, every=every) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def stages(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done while the block lasts: the yielded function is told each next stage.

    A terminal has one line for all of them, a log one for each.
    """
    if console.is_terminal:
        with console.status(first) as status:
            yield status.update
    else:

        def write(stage: str) -> None:
            console.print(stage, highlight=False, markup=False, soft_wrap=True)

        write(first)
        yield write


def _columns(unit: str) -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if unit == BYTES else MofNCompleteColumn(),
        *([TextColumn(unit)] if unit and unit != BYTES else []),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
