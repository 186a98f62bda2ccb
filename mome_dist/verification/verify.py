"""Verify layouts against the one-process reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mome_dist.parallel.forked import run_forked
from mome_dist.verification.compare import BF16_TOLERANCE, TOLERANCE, Comparison, Mismatch, compare
from mome_dist.verification.probe import Probe
from mome_dist.verification.run import Case, Outcome, merged, run_case, run_reference

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Verdict:
    """What the comparison of one case with one optimiser found; ``failure`` if the run itself failed."""

    case: Case
    optimizer: str
    comparison: Comparison | None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.comparison is not None and not self.comparison.mismatches

    @property
    def worst(self) -> Mismatch | None:
        """The largest mismatch."""
        return self.comparison.mismatches[0] if self.comparison and self.comparison.mismatches else None


class Verifier:
    """Runs cases in forked processes; the reference of each kind of run is computed once.

    Args:
        probe: what is trained.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._references: dict[tuple[str | None, str, bool | None, str], Outcome] = {}

    def check(self, case: Case, optimizer: str, plant: Callable[[], None] | None = None) -> Verdict:
        """Run one case and compare it with the reference.

        Args:
            plant: called in every worker, to plant a fault: for tests of the verification itself.
        """
        key = (case.placement, case.precision, case.train_projectors, optimizer)
        if key not in self._references:
            self._references[key] = run_forked(run_reference, 1, self.probe, case, optimizer)[0]
        try:
            whole = merged(run_forked(run_case, case.layout.world_size, self.probe, case, optimizer, plant))
        except (RuntimeError, ValueError) as error:
            return Verdict(case, optimizer, None, str(error))
        return Verdict(case, optimizer, self._compare(whole, self._references[key], case))

    def _compare(self, whole: Outcome, reference: Outcome, case: Case) -> Comparison:
        if case.precision == "fp32":
            return compare(whole, reference, TOLERANCE)
        return compare(whole, reference, BF16_TOLERANCE, together=True)
