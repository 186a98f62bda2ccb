"""What came of a trial: its steps, or why it failed."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP_STEPS = 2
# Of losses and gradient norms. The order of sums differs between settings: in fp32 by 1e-7, which Adam can multiply by
# a few hundred in as many steps as a trial has. A factor or a gradient of another step is far above.
SAME = 1e-3


@dataclass(frozen=True)
class TimedStep:
    """One step of a trial: seconds of its slowest rank, its loss, the norm of its gradient before clipping."""

    seconds: float
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        steps: all of it; empty if it failed.
        failure: why, in a line; None if it ran.
    """

    steps: tuple[TimedStep, ...] = ()
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Seconds of every step after the first ones."""
        return [step.seconds for step in self.steps[WARM_UP_STEPS:]]

    def difference(self, reference: Outcome) -> str | None:
        """Return in a line in which step this trained something else than the reference did; None if it did not."""
        for number, (mine, other) in enumerate(zip(self.steps, reference.steps, strict=True), 1):
            for what, value, expected in (
                ("loss", mine.loss, other.loss),
                ("gradient norm", mine.gradient_norm, other.gradient_norm),
            ):
                if not math.isclose(value, expected, rel_tol=SAME):
                    return f"trains differently: {what} {value:.6g} instead of {expected:.6g} in step {number}"
        return None
