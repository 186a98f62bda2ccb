"""What can go wrong between two steps, and what all ranks then do together.

A request to stop (SIGTERM from a scheduler, SIGUSR1 ahead of a time limit) ends the run after the current step with a
checkpoint and the exit code `PREEMPTED`, which a launcher may take for "start me again" (see `mome_dist.exit_codes`). A
loss or gradient that is not finite costs its step, not the run, unless it happens several times in a row.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mome_dist.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Agreement:
    """What the ranks found together.

    Attributes:
        finite: whether every value is.
        stop: whether any rank was asked to stop.
        data_wait: seconds that the slowest rank waited for its batch.
    """

    finite: bool
    stop: bool
    data_wait: float


class StepWatch:
    """Notes stop signals while it is open, and lets the ranks agree once a step.

    When it closes because the run stops as asked, the process ignores such signals from there on: one rank may be told
    a moment after the ranks have agreed to stop, and would otherwise die of it with everything saved.

    Args:
        device: of this rank's collectives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._asked = device, False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StepWatch:
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if isinstance(error, PreemptedError) else handler)

    def agree(self, finite: bool, data_wait: float) -> Agreement:
        """Combine what this rank found with all others; every rank calls it at the same point of a step."""
        found = torch.tensor([not finite, self._asked, data_wait], dtype=torch.float64, device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        bad, stop, longest = found.tolist()
        return Agreement(finite=not bad, stop=bool(stop), data_wait=longest)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        # Only noted here: a handler runs anywhere, even inside a collective.
        self._asked = True
