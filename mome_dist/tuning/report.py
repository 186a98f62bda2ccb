"""What a search found, as a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from mome_dist.evaluation.style import FAINT, INK, MUTED, TASK_COLORS, grid, styled
from mome_dist.tuning.search import Found, Measured


def ordered(measured: Sequence[Measured]) -> list[Measured]:
    """Fastest first, what failed last."""
    return sorted(measured, key=lambda one: (one.failure is not None, one.pruned, one.median))


def table_of(found: Found) -> Table:
    """A row for each trial."""
    table = Table(title="DeepSpeed settings, seconds of a step")
    for heading in ("setting", "median", "least", "most", "last round", ""):
        table.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    for one in ordered(found.measured):
        if one.failure is not None:
            table.add_row(one.trial.name, "-", "-", "-", "-", f"{'not run: ' * one.pruned}{one.failure}")
            continue
        last = f"{one.final_median:.4f}" if one.final else ""
        note = "best" if one is found.best else "hand-picked" if one.trial.hand_picked else ""
        if one is found.best and one.trial.hand_picked:
            note = "best, hand-picked"
        figures = [f"{value:.4f}" for value in (one.median, min(one.seconds), max(one.seconds))]
        table.add_row(one.trial.name, *figures, last, note)
    return table


def figure_of(found: Found) -> Figure:
    """Median and range of every trial that ran, the fastest on top; below, what failed."""
    trials = ordered(found.measured)
    with styled():
        figure = Figure(figsize=(9, 1.2 + 0.28 * len(trials)), layout="constrained")
        axes = figure.subplots()
        for place, one in enumerate(trials):
            if one.failure is not None:
                axes.text(0, place, f" {one.failure[:70]}", va="center", color=MUTED, fontsize=8, style="italic")
                continue
            color = TASK_COLORS["avsr"] if one is found.best else TASK_COLORS["asr"] if one.trial.hand_picked else FAINT
            axes.barh(place, one.median, height=0.7, color=color)
            axes.plot([min(one.seconds), max(one.seconds)], [place, place], color=INK, linewidth=1)
        axes.set_yticks(range(len(trials)), [one.trial.name for one in trials])
        axes.set_ylim(len(trials) - 0.4, -0.6)
        axes.set(title="Blue: hand-picked. Grey: searched. Green: best.", xlabel="seconds of a step (line: range)")
        grid(axes, "x")
    return figure


def record_of(found: Found) -> dict[str, Any]:
    """Everything measured, JSON-serialisable."""
    return {
        "best": found.best.trial.name,
        "best_hand_picked": found.best_hand_picked.trial.name if found.best_hand_picked else None,
        "trials": [
            {
                "name": one.trial.name,
                "deepspeed": one.trial.deepspeed,
                "overrides": one.trial.overrides,
                "hand_picked": one.trial.hand_picked,
                "pruned": one.pruned,
                "failure": one.failure,
                "seconds": one.seconds,
                "last_round": one.final,
                "median": one.median if one.failure is None else None,
                "last_median": one.final_median if one.final and one.failure is None else None,
            }
            for one in ordered(found.measured)
        ],
    }
