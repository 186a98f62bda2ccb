"""Figures of accuracy against what makes it worse or dearer: noise, broken video, tokens and time.

Each function takes the entries of ``results.json`` and returns a matplotlib figure; nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mome_dist.evaluation.labels import Labelled, add_labels
from mome_dist.evaluation.style import (
    INK,
    MUTED,
    RUN_COLORS,
    TASK_COLORS,
    grid,
    legend_beside,
    line_styles,
    styled,
    view_colors,
)

Entry = Mapping[str, Any]


def _bars(entries: Sequence[Entry]) -> np.ndarray:
    """Lengths of the interval below and above each rate, [2, N]."""
    return np.array([[max(0.0, e["wer"] - e["wer_low"]), max(0.0, e["wer_high"] - e["wer"])] for e in entries], float).T


def has_noise(views: Sequence[Entry]) -> bool:
    """Whether there is anything for `noise_figure`."""
    return any(view["snr"] is not None and view["video_corruption"] is None for view in views)


def noise_figure(views: Sequence[Entry]) -> Figure:
    """Word error rate against the ratio of speech to noise, a panel a noise, a line a view; clean speech on the right.

    A view that hears nothing is a level line.
    """
    plain = [view for view in views if view["video_corruption"] is None]
    noises = list(dict.fromkeys(view["noise"] for view in plain if view["noise"] is not None))
    names = list(dict.fromkeys(view["view"] for view in plain))
    colors, styles = view_colors(names), line_styles(names)
    ratios = sorted({view["snr"] for view in plain if view["snr"] is not None})
    gap = max(5.0, ratios[-1] - ratios[-2]) if len(ratios) > 1 else 5.0
    clean_at = ratios[-1] + gap
    with styled():
        figure = Figure(figsize=(2.5 + 4.8 * len(noises), 3.8), layout="constrained")
        panels = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
        for axes, noise in zip(panels, noises, strict=True):
            for name in names:
                entries = [view for view in plain if view["view"] == name and view["noise"] in (noise, None)]
                _noise_line(axes, name, entries, ratios, clean_at, colors[name], styles[name])
            axes.set(title=Path(noise).name, xlabel="speech to noise [dB]")
            axes.set_xticks([*ratios, clean_at], [*(f"{ratio:g}" for ratio in ratios), "clean"])
            axes.set_ylim(bottom=0)
            grid(axes)
        panels[0].set_ylabel("word error rate [%]")
        legend_beside(figure)
        return figure


def _noise_line(
    axes: Axes, name: str, entries: Sequence[Entry], ratios: Sequence[float], clean_at: float, color: Any, style: str
) -> None:
    deaf = name.startswith("vsr(")
    clean = [entry for entry in entries if entry["snr"] is None]
    if deaf and clean:
        axes.errorbar([ratios[0], clean_at], [clean[0]["wer"]] * 2, color=color, linestyle=style, label=name)
        return
    ordered = sorted(entries, key=lambda entry: clean_at if entry["snr"] is None else entry["snr"])
    at = [clean_at if entry["snr"] is None else entry["snr"] for entry in ordered]
    rates = [entry["wer"] for entry in ordered]
    axes.errorbar(
        at, rates, _bars(ordered), color=color, linestyle=style, marker="o", markersize=3.5, capsize=2, label=name
    )


def has_corruption(views: Sequence[Entry]) -> bool:
    """Whether there is anything for `corruption_figure`."""
    return any(view["video_corruption"] is not None and view["noise"] is None for view in views)


def corruption_figure(views: Sequence[Entry]) -> Figure:
    """Word error rate of the views that see, without noise, with and without each corruption of the video."""
    seeing = [view for view in views if view["video_rate"] is not None and view["noise"] is None]
    names = list(dict.fromkeys(view["view"] for view in seeing))
    kinds = list(dict.fromkeys(view["video_corruption"] for view in seeing))
    colors = view_colors(names)
    width = 0.8 / len(names)
    with styled():
        figure = Figure(figsize=(max(5.5, 1.5 + 1.5 * len(kinds)), 3.8), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            entries = {view["video_corruption"]: view for view in seeing if view["view"] == name}
            there = [place for place, kind in enumerate(kinds) if kind in entries]
            found = [entries[kinds[place]] for place in there]
            at = np.array(there, float) + (number - (len(names) - 1) / 2) * width
            axes.bar(at, [entry["wer"] for entry in found], width, color=colors[name], label=name)
            axes.errorbar(at, [entry["wer"] for entry in found], _bars(found), color=INK, linestyle="", linewidth=0.8)
        axes.set_xticks(range(len(kinds)), ["none" if kind is None else kind for kind in kinds])
        axes.set(title="Video as it is, and broken", ylabel="word error rate [%]")
        legend_beside(figure)
        grid(axes)
        return figure


def cost_figure(views: Sequence[Entry]) -> Figure:
    """Word error rate against cost: tokens that the LLM reads of an utterance on the left, seconds for a second of
    speech on the right. Down and to the left is better."""
    quantities = {
        "LLM tokens before the text, mean of an utterance": "llm_tokens",
        "seconds for a second of speech (one process)": "real_time_factor",
    }
    with styled():
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panels = []
        for axes, (label, key) in zip(figure.subplots(1, 2, sharey=True), quantities.items(), strict=True):
            points: list[Labelled] = []
            for task, color in TASK_COLORS.items():
                entries = sorted((view for view in views if view["task"] == task), key=lambda view: view[key])
                if not entries:
                    continue
                costs, rates = [entry[key] for entry in entries], [entry["wer"] for entry in entries]
                axes.errorbar(
                    costs, rates, _bars(entries), color=color, marker="o", markersize=4, capsize=2, label=task.upper()
                )
                points += [
                    Labelled(entry[key], entry["wer"], entry["wer_low"], entry["wer_high"], entry["rates"])
                    for entry in entries
                ]
            axes.set(xlabel=label)
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room for labels above
            axes.xaxis.set_major_locator(MaxNLocator(6))  # as many as have room in any number of digits
            grid(axes, "both")
            panels.append((axes, points))
        figure.axes[0].set_ylabel("word error rate [%]")
        legend_beside(figure)
        add_labels(figure, panels)
        return figure


def differences_figure(runs: Mapping[str, Sequence[Entry]], first: str) -> Figure:
    """By how much word error rates of runs differ from those of the run ``first``, with intervals: a row a view and
    condition.

    Args:
        runs: entries of `mome_dist.evaluation.comparison.compare`, by name.
    """
    rows = list(dict.fromkeys((entry["view"], entry["condition"]) for entries in runs.values() for entry in entries))
    places = {row: place for place, row in enumerate(rows)}
    several = any(condition != "clean" for _, condition in rows)
    step = 0.7 / len(runs)
    with styled():
        figure = Figure(figsize=(8, 1.2 + max(0.28, 0.13 * len(runs)) * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=1)
        for number, (name, entries) in enumerate(runs.items()):
            at = [
                places[entry["view"], entry["condition"]] + (number - (len(runs) - 1) / 2) * step for entry in entries
            ]
            bars = [
                [entry["difference"] - entry["low"] for entry in entries],
                [entry["high"] - entry["difference"] for entry in entries],
            ]
            axes.errorbar(
                [entry["difference"] for entry in entries],
                at,
                xerr=np.maximum(0, bars),
                fmt="o",
                markersize=4,
                capsize=2,
                linewidth=1.2,
                color=RUN_COLORS[(number + 1) % len(RUN_COLORS)],
                label=name,
            )
        axes.set_yticks(range(len(rows)), [f"{view}, {condition}" if several else view for view, condition in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"word error rate minus that of {first} [percentage points]")
        legend_beside(figure)
        grid(axes, "x")
        return figure
