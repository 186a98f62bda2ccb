"""Run a case and compare with the unbroken run: the loss curve, and the utterances of every step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mome_dist.drills.bench import SAVE_EVERY, STEPS, Bench, Ended, records
from mome_dist.drills.cases import Case
from mome_dist.launchers.restarts import may_restart


@dataclass(frozen=True)
class Curve:
    """What a run trained: loss and utterances by step, and the utterances of skipped steps."""

    losses: dict[int, float]
    utterances: dict[int, list[str]]
    skipped: dict[int, list[str]]
    repeated_steps: int

    @classmethod
    def read(cls, run: Path) -> Curve:
        """From the ``metrics.jsonl`` of a run."""
        lines = records(run / "metrics.jsonl")
        steps = [line for line in lines if "loss" in line]
        skipped = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
        numbers = [line["step"] for line in steps] + list(skipped)
        return cls(
            {line["step"]: line["loss"] for line in steps},
            {line["step"]: line["utterances"] for line in steps},
            skipped,
            len(numbers) - len(set(numbers)),
        )


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        codes: exit code of each start.
        restarts: starts after the first that a launcher would have made by itself.
        recovery: longest time (s) from a fault to the first step after it; None where no start recovered from one.
        curve: largest relative difference of a loss from the unbroken run's.
        lost, repeated: utterances that were trained on less or more often than in the unbroken run.
        problems: what is wrong; none for a case that passed.
    """

    name: str
    codes: list[int]
    restarts: int
    recovery: float | None
    curve: float
    lost: int
    repeated: int
    problems: list[str]


def run_case(bench: Bench, case: Case, reference: Curve) -> Verdict:
    """Run all starts of a case."""
    run = bench.folder / "runs" / re.sub(r"\W+", "-", case.name)
    cache = bench.folder / case.cache
    overrides = (f"training.steps={STEPS}", f"training.save_every={SAVE_EVERY}", *case.overrides)
    if case.own_reference:
        reference = unbroken(bench, overrides, run.with_name(f"{run.name}-unbroken"), cache)
    problems: list[str] = []
    ended: list[Ended] = []
    for number, start in enumerate(case.starts, 1):
        if start.before is not None:
            start.before(run)
        arguments = [*overrides, *start.overrides, f"output_dir={run}"]
        ended.append(bench.start(start.processes or bench.processes, arguments, cache, start.injections))
        code, text = ended[-1].outcome.code, " ".join(ended[-1].text.split())
        if code not in start.codes:
            problems.append(
                f"start {number} ended with {code}, not {' or '.join(map(str, start.codes))}: {text[-600:]}"
            )
            break
        if not re.search(start.says, text):
            problems.append(f"start {number} did not say {start.says!r}: {text[-600:]}")
    return _judge(case, ended, reference, Curve.read(run), problems)


def unbroken(bench: Bench, overrides: Sequence[str], run: Path, cache: Path) -> Curve:
    """What a run trains that nothing happens to."""
    ended = bench.start(bench.processes, [*overrides, f"output_dir={run}"], cache, ())
    if ended.outcome.code != 0:
        raise RuntimeError(f"the unbroken run ended with {ended.outcome.code}:\n{ended.text}")
    return Curve.read(run)


def _judge(case: Case, ended: list[Ended], reference: Curve, found: Curve, problems: list[str]) -> Verdict:
    first_skipped = min(case.skipped, default=len(reference.losses) + 1)
    compared = [step for step in reference.losses if step < first_skipped]
    differences = [
        abs(found.losses.get(step, float("inf")) - reference.losses[step]) / abs(reference.losses[step])
        for step in compared
    ]
    curve = max(differences)
    if not curve <= case.tolerance:
        problems.append(f"losses differ by {curve:.1e}, allowed is {case.tolerance:g}")
    if tuple(found.skipped) != case.skipped:
        problems.append(f"steps {list(found.skipped)} were skipped, not {list(case.skipped)}")
    seen, due = (
        Counter((step, name) for step, names in {**each.utterances, **each.skipped}.items() for name in names)
        for each in (found, reference)
    )
    lost, repeated = (due - seen).total(), (seen - due).total()
    if lost or repeated or found.repeated_steps:
        problems.append(f"{lost} utterances lost, {repeated} repeated, {found.repeated_steps} steps logged twice")
    names = {name for _, name in seen}
    if trained := names & set(case.left_out):
        problems.append(f"trained on damaged utterances: {', '.join(sorted(trained))}")
    recoveries = [
        after.ready - before.fault
        for before, after in pairwise(ended)
        if after.ready is not None and before.fault is not None
    ]
    restarts = sum(may_restart(each.outcome) for each in ended[:-1])
    codes = [each.outcome.code for each in ended]
    return Verdict(case.name, codes, restarts, max(recoveries, default=None), curve, lost, repeated, problems)
