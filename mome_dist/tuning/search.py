"""The search: every hand-picked trial, then single changes to the best until none helps, then the finalists again.

A trial counts only if its steps have the losses and gradient norms of ZeRO 0 without further settings.

Speeds drift on a machine that does other things too. So trials run in rounds (all once, all again), medians are
compared, and what is named the best was measured in a last round beside the best hand-picked one, turn by turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mome_dist.tuning.outcome import Outcome
from mome_dist.tuning.space import Trial, zero_settings
from mome_dist.tuning.trial import Runner

FINALISTS = 3


@dataclass
class Measured:
    """A trial and what it did so far.

    Attributes:
        trial: the setting.
        seconds: of its steps, in all rounds before the last.
        final: of its steps in the last round, for finalists.
        failure: why it cannot be used; None if it can.
        pruned: whether it was refused without a run.
        first: its first run; None before that.
    """

    trial: Trial
    seconds: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    failure: str | None = None
    pruned: bool = False
    first: Outcome | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step before the last round; infinite for what failed."""
        return statistics.median(self.seconds) if self.seconds and self.failure is None else float("inf")

    @property
    def final_median(self) -> float:
        """Median seconds of a step in the last round; infinite for what was not in it."""
        return statistics.median(self.final) if self.final and self.failure is None else float("inf")

    def add(self, outcome: Outcome, final: bool) -> None:
        """Take in one more run."""
        self.failure = outcome.failure
        self.first = self.first or outcome
        (self.final if final else self.seconds).extend(outcome.seconds)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        measured: every trial.
        best: the fastest in the last round.
        best_hand_picked: the hand-picked one that came into the last round; None if none ran.
    """

    measured: list[Measured]
    best: Measured
    best_hand_picked: Measured | None


def tune(
    picked: Sequence[Trial],
    runner: Runner,
    refuse: Callable[[Trial], str | None],
    vary: Callable[[Trial], Iterable[Trial]],
    rounds: int,
    most: int,
    tell: Callable[[Measured], None],
) -> Found | None:
    """Run the search.

    Args:
        picked: trials to start from.
        refuse: why a trial need not run, or None.
        vary: neighbours of a trial.
        rounds: runs of every trial, and of the finalists at the end.
        most: trials to run at most, hand-picked ones included.
        tell: called after every run.

    Returns:
        None if no trial ran.
    """
    known: dict[str, Measured] = {}
    references: dict[str, Measured] = {}

    def run(trials: Iterable[Trial]) -> None:
        fresh: list[Measured] = []
        for trial in trials:
            if trial.name in known or sum(not each.pruned for each in known.values()) >= most:
                continue
            known[trial.name] = one = Measured(trial)
            one.failure = refuse(trial)
            one.pruned = one.failure is not None
            if one.pruned:
                tell(one)
            else:
                fresh.append(one)
        _rounds(fresh, runner, rounds, tell, final=False)
        for one in fresh:
            if one.failure is None and one.first is not None:
                expected = reference(one.trial.overrides)
                one.failure = one.first.difference(expected) if expected else "no plain ZeRO stage ran to compare with"
                if one.failure is not None:
                    tell(one)

    def reference(overrides: dict[str, str]) -> Outcome | None:
        """The job with these overrides at the lowest stage of ZeRO that runs, without further DeepSpeed settings."""
        for stage in (0, 1, 2):
            trial = Trial(zero_settings(stage), overrides)
            if trial.name not in references:
                measured = known.get(trial.name) or Measured(trial, failure=refuse(trial))
                if measured.first is None and measured.failure is None:
                    measured.add(runner.run(trial), final=False)
                references[trial.name] = measured
            first = references[trial.name].first
            if first is not None and first.failure is None:
                return first
        return None

    run(picked)
    while True:
        best = min(known.values(), key=lambda one: one.median)
        if best.failure is not None or not best.seconds:
            return None
        before = len(known)
        run(vary(best.trial))
        if len(known) == before or min(known.values(), key=lambda one: one.median) is best:
            break
    ranking = sorted((one for one in known.values() if one.seconds and not one.failure), key=lambda one: one.median)
    finalists = ranking[:FINALISTS]
    hand_picked = next((one for one in ranking if one.trial.hand_picked), None)
    if hand_picked is not None and hand_picked not in finalists:
        finalists.append(hand_picked)
    _rounds(finalists, runner, rounds, tell, final=True)
    best = min(finalists, key=lambda one: one.final_median)
    return Found(list(known.values()), best, hand_picked)


def _rounds(
    trials: Sequence[Measured], runner: Runner, rounds: int, tell: Callable[[Measured], None], final: bool
) -> None:
    for _ in range(rounds):
        for one in trials:
            if one.failure is None:  # what failed once is not tried again
                one.add(runner.run(one.trial), final)
                tell(one)
