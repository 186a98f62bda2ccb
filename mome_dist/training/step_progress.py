"""A progress bar over optimiser steps with the loss and accuracy of the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

StepReport = Callable[[int, float, float], None]
"""Told (step, loss, accuracy) after each step."""


def ignore(step: int, loss: float, accuracy: float) -> None:
    """The report that shows nothing."""


@contextmanager
def step_progress(title: str, steps: int, console: Console) -> Iterator[StepReport]:
    """Show a bar of ``steps`` steps on ``console`` (a quiet one on ranks that should be silent)."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=steps, loss=0.0, accuracy=0.0)

        def report(step: int, loss: float, accuracy: float) -> None:
            progress.update(bar, completed=step + 1, loss=loss, accuracy=accuracy)

        yield report
