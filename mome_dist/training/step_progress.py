"""How far pre-training has come, with the mean loss and accuracy of the last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console

from mome_dist.progress import progress

SHOWN_STEPS = 20  # of which the means of a line of progress are

StepReport = Callable[[int, float, float], None]
"""Told (step, loss, accuracy) after each step."""


def ignore(step: int, loss: float, accuracy: float) -> None:
    """The report that shows nothing."""


def over(steps: int) -> str:
    """Say of how many steps the numbers before it are means, of ``SHOWN_STEPS`` at most; nothing for one."""
    return f" over {min(steps, SHOWN_STEPS)} steps" if steps > 1 else ""


@contextmanager
def step_progress(title: str, steps: int, console: Console) -> Iterator[StepReport]:
    """Show how many of ``steps`` steps are done on ``console`` (a quiet one on ranks that should be silent)."""
    losses, accuracies = deque[float](maxlen=SHOWN_STEPS), deque[float](maxlen=SHOWN_STEPS)
    with progress(console, title, steps, unit="steps") as shown:

        def report(step: int, loss: float, accuracy: float) -> None:
            losses.append(loss)
            accuracies.append(accuracy)
            shown.update(step + 1, f"loss {fmean(losses):.3f}", f"accuracy {fmean(accuracies):.3f}{over(len(losses))}")

        yield report
