"""Reading what a run logged, and figures of expert load.

``metrics.jsonl`` and ``routing.jsonl`` grow while a run trains. A run that was killed may leave half a line at the end,
and one that resumed writes some steps again: the later record of a step counts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mome_dist.text_files import split_lines

Floats = NDArray[np.float64]

CONFLICTS = "conflicts.jsonl"

logger = logging.getLogger(__name__)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; an absent file has none, lines that are no object are left out with a warning."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(split_lines(path.read_text(encoding="utf-8", errors="replace")), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif line.strip():
            logger.warning("%s:%d is no record of a step and is left out.", path, number)
    return records


def _by_step(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One record a step, in order of steps. A resume goes back to its checkpoint: what the lost part of the run had
    logged after that did not happen."""
    kept: list[Mapping[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


@dataclass(frozen=True)
class TrainingLog:
    """The lines of ``metrics.jsonl``: ``steps`` of training and ``validations``, each in order of steps."""

    steps: list[Mapping[str, Any]]
    validations: list[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """Read the file; an absent one is an empty log."""
        records = read_jsonl(path)
        return cls(
            _by_step([record for record in records if "loss" in record]),
            _by_step([record for record in records if "validation" in record]),
        )

    def series(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of one number, such as "loss"."""
        pairs = [(record["step"], record[key]) for record in self.steps if record.get(key) is not None]
        return _columns(pairs)

    def views(self) -> list[str]:
        """Names of the views in the log, by task and from fine to coarse rates."""
        names = [name for record in self.steps for name in record.get("views", {})]
        names += [name for record in self.validations for name in record["validation"]]
        return sorted(dict.fromkeys(names), key=_task_and_rates)

    def view_series(self, view: str) -> tuple[Floats, Floats]:
        """Steps and training losses of a view; steps that did not draw it are absent."""
        return _columns([(r["step"], r["views"][view]) for r in self.steps if view in r.get("views", {})])

    def validation_series(self, view: str | None) -> tuple[Floats, Floats]:
        """Steps and validation losses of a view, or of the mean over views for None."""
        pairs = []
        for record in self.validations:
            losses = record["validation"]
            if view is None and losses:
                pairs.append((record["step"], float(np.mean(list(losses.values())))))
            elif view in losses:
                pairs.append((record["step"], losses[view]))
        return _columns(pairs)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _task_and_rates(view: str) -> tuple[str, list[int]]:
    """Sort key: "avsr(4,16)" before "avsr(16,2)"."""
    task, _, rates = view.partition("(")
    return task, [int(rate) for rate in re.findall(r"\d+", rates)]


@dataclass(frozen=True)
class Ends:
    """How a series began and ended: the mean of its first ``steps`` values, and of its last. One step is a draw of a
    few utterances in a few views, and says little."""

    first: float
    last: float
    steps: int

    @classmethod
    def of(cls, values: Sequence[float] | Floats) -> Ends:
        """Average the ends of a series of one value at least.

        The window is a twentieth of the values but 20 at least, and never more than half of them, so that the two means
        share none where there are two values.
        """
        count = min(max(20, len(values) // 20), max(1, len(values) // 2))
        return cls(float(np.mean(values[:count])), float(np.mean(values[-count:])), count)

    @property
    def window(self) -> str:
        """Such as "20 steps"."""
        return f"{self.steps} step{'s' if self.steps > 1 else ''}"


def smoothed(values: Floats, window: int) -> Floats:
    """Centred moving average over ``window`` values (an odd number); near the ends, over those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - window // 2, 0)
    last = np.minimum(index + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


@dataclass(frozen=True)
class RoutingLog:
    """``routing.jsonl``: N lines, L layers, E experts; V views in the order of tasks and from fine to coarse rates.

    Attributes:
        steps: int [N]; each line counts since the one before.
        asked, dropped: fp64 [N, L, E], routes asked for, and those of them lost to capacity.
        tokens, positions: fp64 [N], tokens, and tokens with padding; zero in logs that do not have them.
        views: names of the views that have been trained at a checkpoint.
        asked_by_view, dropped_by_view: fp64 [V, L, E] over the whole run up to its newest checkpoint.
        tokens_by_view, positions_by_view: fp64 [V], likewise.
    """

    steps: NDArray[np.int64]
    asked: Floats
    dropped: Floats
    tokens: Floats
    positions: Floats
    views: tuple[str, ...]
    asked_by_view: Floats
    dropped_by_view: Floats
    tokens_by_view: Floats
    positions_by_view: Floats

    @classmethod
    def read(cls, path: Path) -> RoutingLog | None:
        """Read the file; None if it is absent or empty."""
        records = _by_step(read_jsonl(path))
        if not records:
            return None
        asked, dropped, tokens, positions = (
            np.asarray([record.get(key, 0) for record in records], np.float64)
            for key in ("asked", "dropped", "tokens", "positions")
        )
        parts = [record["by_view"] for record in records if "by_view" in record]
        views = sorted({view for part in parts for view in part}, key=_task_and_rates)

        def of_run(key: str) -> list[Floats]:
            return [np.sum([part[view][key] for part in parts if view in part], axis=0, dtype=float) for view in views]

        return cls(
            np.asarray([record["step"] for record in records]),
            asked,
            dropped,
            tokens,
            positions,
            tuple(views),
            np.asarray(of_run("asked")).reshape(-1, *asked.shape[1:]),
            np.asarray(of_run("dropped")).reshape(-1, *asked.shape[1:]),
            np.asarray(of_run("tokens")),
            np.asarray(of_run("positions")),
        )

    def drop_rate(self) -> Floats:
        """Dropped in percent of asked routes: [N, layers]."""
        return 100 * self.dropped.sum(-1) / np.maximum(self.asked.sum(-1), 1)


@dataclass(frozen=True)
class ConflictLog:
    """``conflicts.jsonl``: mean cosines between the gradients of views, over the lines that have both.

    Attributes:
        lines: how many there are.
        views: in the order of tasks and from fine to coarse rates.
        experts, router: fp64 [V, V], over layers, and over the experts that both views train; nan where two views never
            met.
        negative: fp64 [V, V], the share of cosines of experts that are below zero.
    """

    lines: int
    views: tuple[str, ...]
    experts: Floats
    router: Floats
    negative: Floats

    @classmethod
    def read(cls, path: Path) -> ConflictLog | None:
        """Read the file; None if it is absent or empty."""
        records = _by_step(read_jsonl(path))
        views = sorted({view for record in records for view in record["views"]}, key=_task_and_rates)
        if not views:
            return None
        cosines: dict[tuple[int, int], list[float]] = {}
        router: dict[tuple[int, int], list[float]] = {}
        for record in records:
            for pair, of_experts, of_router in zip(*(record[k] for k in ("pairs", "experts", "router")), strict=True):
                one, other = sorted(views.index(record["views"][place]) for place in pair)
                cosines.setdefault((one, other), []).extend(c for row in of_experts for c in row if c is not None)
                router.setdefault((one, other), []).extend(c for c in of_router if c is not None)
        negative = {pair: [float(cosine < 0) for cosine in values] for pair, values in cosines.items()}
        tables = (_table(len(views), values, same) for values, same in ((cosines, 1), (router, 1), (negative, 0)))
        return cls(len(records), tuple(views), *tables)


def _table(size: int, values: Mapping[tuple[int, int], Sequence[float]], same: float) -> Floats:
    """Means by pair as a symmetric matrix."""
    table = np.full((size, size), np.nan)
    np.fill_diagonal(table, same)
    for (one, other), found in values.items():
        if found:
            table[one, other] = table[other, one] = float(np.mean(found))
    return table


def imbalance(counts: Floats) -> Floats:
    """Load of the busiest expert over the mean load, along the last axis: 1 is perfect balance, E the worst."""
    mean = counts.mean(axis=-1)
    return np.divide(counts.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def normalized_entropy(counts: Floats) -> Floats:
    """Entropy of the load over experts divided by log E, along the last axis: 1 is uniform, 0 a single expert."""
    totals = counts.sum(axis=-1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = -(shares * logs).sum(axis=-1)
    return entropy / np.log(max(counts.shape[-1], 2))
