"""Starting a run again after it was preempted, crashed or lost a rank; it continues from its newest checkpoint.

The new processes find the time of the failure in ``MOME_DIST_FAILED_AT`` and say how long the way back took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from mome_dist.exit_codes import FAILED_AT, INTERRUPTED, PREEMPTED, RANK_LOST, TIMED_OUT, USER_ERROR
from mome_dist.launchers.ranks import Outcome

FINAL_CODES = (0, USER_ERROR, INTERRUPTED, TIMED_OUT)
_NAMES = {PREEMPTED: "preempted", RANK_LOST: "a rank was lost"}


def may_restart(outcome: Outcome) -> bool:
    """Whether another start can help: not after success, a mistake of the user, a time limit or a signal to stop."""
    return outcome.code not in FINAL_CODES and not outcome.asked_to_stop


def run_with_restarts(
    start: Callable[[Mapping[str, str]], Outcome], restarts: int, environment: Mapping[str, str]
) -> Outcome:
    """Run a world, and again up to ``restarts`` times where that can help; say on stderr what failed.

    Args:
        start: runs one world with the given environment to its end.

    Returns:
        How the last world ended.
    """
    outcome = start(environment)
    for attempt in range(1, restarts + 1):
        if not may_restart(outcome):
            break
        print(
            f"launcher: {describe(outcome)}; starting again, restart {attempt} of {restarts}",
            file=sys.stderr,
            flush=True,
        )
        outcome = start({**environment, FAILED_AT: f"{time.time():.3f}"})
    return outcome


def describe(outcome: Outcome) -> str:
    """Such as ``rank 1 failed first, with exit code 137 (signal 9)``."""
    signalled = f"signal {outcome.code - 128}" if outcome.code > 128 else "crashed"
    reason = _NAMES.get(outcome.code, signalled)
    return f"rank {outcome.failed_rank} failed first, with exit code {outcome.code} ({reason})"
