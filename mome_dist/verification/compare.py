"""Compare two outcomes number by number, and say by which factor they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mome_dist.parallel.layout import Layout
from mome_dist.verification.run import Outcome

# fp32 rounds at 6e-8. A gradient here is a sum of about a thousand products over tokens, layers and ranks, taken in
# another order by every layout: its error is a random walk of about sqrt(1000) = 30 roundings of the largest terms,
# 2e-6 of the tensor's largest value. Five times that leaves room for cancellation and is far below any wrong factor.
TOLERANCE = 1e-5
# bf16 rounds at 2e-3. A value passes about a hundred roundings on its way through four layers and back; as a random
# walk that is ten roundings, 2e-2. A router logit that is nearly a tie may fall to the other side, which moves a whole
# token's gradient from one expert to another: so bf16 is judged by the length of the difference of all gradients
# together, not tensor by tensor. A factor of two anywhere, or a rank left out, is several times this bound.
BF16_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Mismatch:
    """One value that differs.

    Attributes:
        what: "loss", "gradient norm", "sink loss", "cross-rate loss", "gradient" or "weight".
        name: of the step or tensor.
        error: largest difference, relative to the reference's largest value.
        ratio: the factor that best explains the difference.
    """

    what: str
    name: str
    error: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """Largest relative errors by kind, and what is beyond the tolerance, worst first."""

    errors: dict[str, float]
    mismatches: tuple[Mismatch, ...]


def compare(actual: Outcome, expected: Outcome, tolerance: float = TOLERANCE, together: bool = False) -> Comparison:
    """Compare a run with the reference.

    Args:
        tolerance: on the largest difference of each tensor, relative to the reference's largest value.
        together: compare all gradients as one vector, and all weights, by the length of the difference.
    """
    pairs: list[tuple[str, str, NDArray[np.floating], NDArray[np.floating]]] = []
    for what, mine, theirs in (
        ("loss", actual.losses, expected.losses),
        ("gradient norm", actual.norms, expected.norms),
        ("sink loss", actual.sinks, expected.sinks),
        ("cross-rate loss", actual.taught, expected.taught),
    ):
        pairs += [
            (what, f"step {i + 1}", np.array(a), np.array(b)) for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
        ]
    missing: list[Mismatch] = []
    for what, tensors, references in (
        ("gradient", actual.gradients, expected.gradients),
        ("weight", actual.weights, expected.weights),
    ):
        for name in sorted(tensors.keys() ^ references.keys()):
            missing.append(Mismatch(what, f"{name} is in one of the runs only", float("inf"), float("nan")))
        names = sorted(tensors.keys() & references.keys())
        if together:
            mine_all, all_of_them = (np.concatenate([part[n].ravel() for n in names]) for part in (tensors, references))
            pairs.append((what, "of all tensors together", mine_all, all_of_them))
        else:
            pairs += [(what, name, tensors[name], references[name]) for name in names]
    errors: dict[str, float] = {}
    found = missing
    for what, name, mine_value, reference in pairs:
        error = _error(mine_value, reference, together)
        errors[what] = max(errors.get(what, 0.0), error)
        if not error <= tolerance:  # also catches what is not a number
            found.append(Mismatch(what, name, error, _ratio(mine_value, reference)))
    return Comparison(errors, tuple(sorted(found, key=lambda mismatch: -mismatch.error)))


def explain(ratio: float, layout: Layout, microbatches: int) -> str:
    """A ratio and the sizes of the layout that equal it or its inverse: "2.00 = ep"."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "dp": layout.dp, "microbatches": microbatches}
    names = [name for name, size in sizes.items() if size > 1 and abs(ratio / size - 1) < 1e-3]
    names += [f"1/{name}" for name, size in sizes.items() if size > 1 and abs(ratio * size - 1) < 1e-3]
    return " = ".join([f"{ratio:.4g}" if names == [] else f"{ratio:.2f}", *names])


def _error(actual: NDArray[np.floating], expected: NDArray[np.floating], by_length: bool) -> float:
    """Relative error: by the largest values, or by the lengths of the vectors."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = actual.astype(np.float64) - expected
    size = np.linalg.norm if by_length else (lambda values: np.abs(values).max())
    scale, error = float(size(np.ravel(expected))), float(size(np.ravel(difference)))
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))


def _ratio(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Least-squares factor from the reference to the actual value."""
    if actual.shape != expected.shape:
        return float("nan")
    norm = float((expected.astype(np.float64) ** 2).sum())
    return float((actual.astype(np.float64) * expected).sum()) / norm if norm > 0 else float("nan")
