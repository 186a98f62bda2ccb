"""Figures of training and accuracy: losses, word error rates, expert load.

Each function takes data and returns a matplotlib figure; nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mome_dist.evaluation.style import (
    FAINT,
    INK,
    LINE_STYLES,
    MUTED,
    RUN_COLORS,
    TASK_COLORS,
    grid,
    legend_beside,
    line_styles,
    styled,
    view_colors,
)
from mome_dist.training_log import Floats, RoutingLog, TrainingLog, imbalance, normalized_entropy, smoothed

_BASELINES: tuple[tuple[str, Literal["-", ":"], str], ...] = (
    ("chance_wer", "-", "chance (shuffled speech)"),
    ("untrained_wer", ":", "untrained model"),
)


def _loss_axis(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="optimiser step", ylabel="cross-entropy [nats per token]", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    grid(axes)


def _window(losses: Floats) -> int:
    """Steps that a smoothed loss is the mean of, an odd number."""
    return max(3, len(losses) // 25 | 1)


def loss_figure(log: TrainingLog) -> Figure:
    """Training loss, raw and smoothed, with validation: all views together on the left, one by one on the right."""
    with styled():
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        whole, by_view = figure.subplots(1, 2, sharey=True)
        steps, losses = log.series("loss")
        window = _window(losses)
        whole.plot(steps, losses, color=FAINT, linewidth=0.8, label="each step")
        whole.plot(steps, smoothed(losses, window), color=INK, label=f"mean of {window} steps")
        at, validation = log.validation_series(None)
        if len(at):
            whole.plot(at, validation, "o-", color="#b2182b", markersize=4, linewidth=1, label="validation")
        _loss_axis(whole, "Mean over views")
        whole.legend()

        views = log.views()
        styles = line_styles(views)
        for view, color in view_colors(views).items():
            steps, losses = log.view_series(view)
            if len(losses):
                line = smoothed(losses, max(3, len(losses) // 15 | 1))
                by_view.plot(steps, line, color=color, linestyle=styles[view], linewidth=1.3, label=view)
            at, validation = log.validation_series(view)
            by_view.plot(at, validation, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.5)
        _loss_axis(by_view, "Each view (dots: validation)")
        by_view.set_ylabel("")
        if views:
            by_view.legend(ncols=1 + len(views) // 8)
        return figure


def losses_figure(logs: Mapping[str, TrainingLog]) -> Figure:
    """Smoothed training losses of several runs in one panel, by the names of the runs; dots are validation."""
    with styled():
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (name, log) in enumerate(logs.items()):
            color, stroke = RUN_COLORS[number % len(RUN_COLORS)], LINE_STYLES[number // len(RUN_COLORS) % 4]
            steps, losses = log.series("loss")
            axes.plot(steps, smoothed(losses, _window(losses)), color=color, linestyle=stroke, label=name)
            at, validation = log.validation_series(None)
            axes.plot(at, validation, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.5)
        _loss_axis(axes, "Mean over views (dots: validation)")
        legend_beside(figure)
        return figure


def wer_figure(views: Sequence[Mapping[str, Any]]) -> Figure:
    """Word error rate of every view with its interval, a panel a task, with the baselines as marks.

    Args:
        views: of ``results.json``, one entry a view.
    """
    tasks = [task for task in TASK_COLORS if any(view["task"] == task for view in views)]
    by_task = {task: [view for view in views if view["task"] == task] for task in tasks}
    top = max([5.0, *(view["wer_high"] for view in views)])
    baselines = [view[key] for view in views for key in ("chance_wer", "untrained_wer") if view[key] is not None]
    # A model that babbles exceeds 100 %; its mark is kept at the edge and its number in the table.
    limit = 1.12 * max(top, min(max(baselines, default=0.0), 110.0))
    with styled():
        width = min(1.6 + 0.85 * len(views), max(12.0, 1.6 + 0.5 * len(views)))
        figure = Figure(figsize=(max(5.5, width), 3.8), layout="constrained")
        widths = [max(len(by_task[task]), 2) for task in tasks]
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, task in zip(panels, tasks, strict=True):
            entries = by_task[task]
            places = np.arange(len(entries))
            rates = [view["wer"] for view in entries]
            axes.bar(places, rates, 0.62, color=TASK_COLORS[task])
            spans = [(view["wer_low"], view["wer_high"]) for view in entries]
            axes.vlines(places, *zip(*spans, strict=True), colors=FAINT, linewidth=2.5)
            for place, rate, (_, high) in zip(places, rates, spans, strict=True):
                axes.annotate(
                    f"{rate:.1f}", (place, high), (0, 2), textcoords="offset points", ha="center", color=INK, fontsize=8
                )
            for place, view in zip(places, entries, strict=True):
                for key, style, _ in _BASELINES:
                    if view[key] is not None:
                        height = min(view[key], 0.95 * limit)
                        axes.hlines(height, place - 0.38, place + 0.38, colors=INK, linestyles=style, linewidth=1.4)
                        if view[key] > height:
                            label = f"\u2191 {view[key]:.0f}"
                            plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                            axes.text(place, 1.01 * height, label, ha="center", va="bottom", fontsize=8, bbox=plain)
            axes.set_xticks(places, [view["rates"] + ("" if view["trained"] else "*") for view in entries])
            axes.set_xlim(-0.6, max(len(entries), 2) - 0.4)
            axes.set_ylim(0, limit)
            what = {"asr": "audio rate", "vsr": "video rate", "avsr": "(audio, video) rates"}[task]
            axes.set(title=task.upper(), xlabel=f"{what} [frames per token]")
            grid(axes)
        panels[0].set_ylabel("word error rate [%]")
        handles = [
            Line2D([], [], color=INK, linestyle=style, linewidth=1.4, label=label)
            for key, style, label in _BASELINES
            if any(view[key] is not None for view in views)
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower right", ncols=2)
        return figure


@dataclass(frozen=True)
class _Quantity:
    """One column of the load figure: values over training [N, layers] and by layer [layers]."""

    title: str
    unit: str
    over_training: Floats
    by_layer: Floats
    color: str

    def limits(self, values: Floats) -> tuple[float, float]:
        """Axis limits that show the values but do not blow up what is next to nothing."""
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if self.unit == "%":
            return 0.0, max(1.0, 1.08 * high)
        return (1.0, max(2.0, 1.05 * high)) if "mean" in self.title else (min(0.9, low - 0.02), 1.005)


def load_figure(log: RoutingLog) -> Figure:
    """Balance between experts and routes dropped for capacity: over training (top), by layer at its end (bottom)."""
    layers, experts = log.asked.shape[1:]
    last = slice(-max(1, len(log.steps) // 4), None)
    asked, dropped = log.asked[last].sum(0), log.dropped[last].sum(0)
    dropped_by_layer = 100 * dropped.sum(-1) / np.maximum(asked.sum(-1), 1)
    quantities = [
        _Quantity("Busiest expert / mean", "1 = balanced", imbalance(log.asked), imbalance(asked), "#7a4fa3"),
        _Quantity(
            "Entropy / log E", "1 = balanced", normalized_entropy(log.asked), normalized_entropy(asked), "#2a7f8e"
        ),
        _Quantity("Dropped routes", "%", log.drop_rate(), dropped_by_layer, "#b2182b"),
    ]
    first, final = log.steps[last][0], log.steps[-1]
    period = f"step {final}" if first == final else f"steps {first} to {final}"
    with styled():
        figure = Figure(figsize=(10, 5.4), layout="constrained")
        for (top, bottom), quantity in zip(figure.subplots(2, 3).T, quantities, strict=True):
            values, color = quantity.over_training, quantity.color
            top.fill_between(log.steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.18, linewidth=0)
            top.plot(log.steps, values.mean(axis=1), color=color, marker="o" if len(log.steps) < 3 else None)
            top.set(title=quantity.title, xlabel="optimiser step", ylim=quantity.limits(values))
            bottom.plot(np.arange(layers), quantity.by_layer, "o-", color=color, markersize=3.5, linewidth=1)
            bottom.set(xlabel=f"layer ({period})", ylim=quantity.limits(quantity.by_layer))
            bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
            for axes in (top, bottom):
                axes.set_ylabel(f"[{quantity.unit}]")
                grid(axes)
        note = f"top: line is the mean of {layers} layers, band their range; bottom: each layer; {experts} experts"
        figure.supxlabel(note, fontsize=8, color=MUTED)
        return figure
