"""How far pre-training has come, with the loss and accuracy of the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from mome_dist.progress import progress

StepReport = Callable[[int, float, float], None]
"""Told (step, loss, accuracy) after each step."""


def ignore(step: int, loss: float, accuracy: float) -> None:
    """The report that shows nothing."""


@contextmanager
def step_progress(title: str, steps: int, console: Console) -> Iterator[StepReport]:
    """Show how many of ``steps`` steps are done on ``console`` (a quiet one on ranks that should be silent)."""
    with progress(console, title, steps, unit="steps") as shown:

        def report(step: int, loss: float, accuracy: float) -> None:
            shown.update(step + 1, f"loss {loss:.3f}", f"accuracy {accuracy:.3f}")

        yield report
