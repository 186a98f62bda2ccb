"""Figures of expert activations: heat maps by layer, rate and modality, and agreement between rates.

These are the views of figures 4, 5, 8 and 9 of MoME (arXiv 2510.04136), made for every run.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from mome_dist.evaluation.activations import MODALITIES, Activations
from mome_dist.evaluation.consistency import Profile, agreement_between_rates, agreement_matrix, profiles
from mome_dist.evaluation.style import INK, MODALITY_COLORS, grid, styled

HEAT = "magma_r"
_ANNOTATED_UP_TO = 20


def tasks_of(activations: Activations) -> list[str]:
    """Tasks that have views, in the order of their appearance."""
    return list(dict.fromkeys(view.split("(")[0] for view in activations.views))


def heat_map_figure(activations: Activations, task: str) -> Figure:
    """Percent of tokens that choose each expert, in every layer: a column a view of the task, a row a modality.

    The colour scale is the same in all panels; it ends at the 99.5th percentile, so that single peaks do not
    hide the rest.
    """
    shares = 100 * activations.shares().numpy()
    layers, _, _, experts = shares.shape
    columns = [number for number, view in enumerate(activations.views) if view.startswith(f"{task}(")]
    rows = [number for number in range(len(MODALITIES)) if np.isfinite(shares[:, columns, number]).any()]
    uniform = 100 * activations.top_k / experts
    top = max(float(np.nanpercentile(shares[:, columns], 99.5)), 1.5 * uniform)
    peak = float(np.nanmax(shares[:, columns]))
    panel_width, panel_height = max(1.9, min(3.2, 0.095 * experts)), max(1.3, min(2.8, 0.075 * layers))
    with styled():
        size = (1.9 + panel_width * len(columns), 0.9 + panel_height * len(rows))
        figure = Figure(figsize=(max(size[0], 4.6), max(size[1], 3.0)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for row, modality in enumerate(rows):
            for column, view in enumerate(columns):
                axes = panels[row][column]
                image = axes.pcolormesh(
                    np.arange(experts + 1) - 0.5,
                    np.arange(layers + 1) - 0.5,
                    shares[:, view, modality],
                    cmap=HEAT,
                    vmin=0,
                    vmax=top,
                )
                axes.invert_yaxis()
                axes.tick_params(length=2)
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_locator(MaxNLocator(6, integer=True))
                if row == 0:
                    axes.set_title(activations.views[view])
                if row == len(rows) - 1:
                    axes.set_xlabel("expert")
                if column == 0:
                    axes.set_ylabel(f"{MODALITIES[modality]} tokens\nlayer", color=INK)
        # sharey flips once for each panel: settle it.
        panels[0][0].set_ylim(layers - 0.5, -0.5)
        bar = figure.colorbar(
            image, ax=panels, shrink=0.9, aspect=30, pad=0.02, extend="max" if peak > top else "neither"
        )
        bar.set_label(f"tokens that chose the expert [%]\n(uniform routing: {uniform:.0f} %)")
        bar.ax.axhline(uniform, color=INK, linewidth=1)
        bar.outline.set_visible(False)
        return figure


def consistency_figure(activations: Activations) -> Figure:
    """Agreement of expert choices between rates: layer by layer (left), and of every pair of profiles (right)."""
    found = profiles(activations)
    side = max(2.8, min(8.5, 0.33 * len(found)))
    labels, curve_width, curve_height = 1.25, 3.9, min(side, 3.2)
    width, height = 0.75 + curve_width + 0.35 + labels + side + 1.0, 0.45 + side + labels
    with styled():
        figure = Figure(figsize=(width, height))

        def axes_at(left: float, top: float, across: float, down: float) -> Axes:
            """Axes at a place in inches from the top left: a square matrix among long labels needs exact sizes."""
            return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height))

        _agreement_curves(axes_at(0.75, 0.4, curve_width, curve_height), found)
        matrix_left = 0.75 + curve_width + 0.35 + labels
        matrix = axes_at(matrix_left, 0.4, side, side)
        image = _agreement_matrix(matrix, found)
        bar = figure.colorbar(image, cax=axes_at(matrix_left + side + 0.2, 0.4, 0.14, side))
        bar.set_label("agreement (1 - JSD)")
        bar.outline.set_visible(False)
        return figure


def _agreement_curves(axes: Axes, found: list[Profile]) -> None:
    curves = agreement_between_rates(found)
    for name, values in curves.items():
        contrast = name not in MODALITIES
        other = "view against view" if name == "text" else "rate against rate"
        label = name if contrast else f"{name}, {other}"
        style = "--" if contrast else "-"
        axes.plot(values, style, color=MODALITY_COLORS[name], label=label, marker="o", markersize=3)
    axes.set(title="Same modality, other rates", xlabel="layer", ylabel="agreement (1 - JSD)")
    axes.set_ylim(min([0.5, *(float(values.min()) - 0.05 for values in curves.values())]), 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid(axes)
    if curves:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, borderaxespad=0, handlelength=3)


def _agreement_matrix(axes: Axes, found: list[Profile]) -> AxesImage:
    matrix = agreement_matrix(found)
    off_diagonal = matrix[~np.eye(len(found), dtype=bool)] if len(found) > 1 else matrix
    lowest = min(0.9, float(np.floor(10 * off_diagonal.min()) / 10))
    image = axes.imshow(matrix, cmap="viridis", vmin=lowest, vmax=1)
    names = [f"{profile.modality}  {profile.view}" for profile in found]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
    axes.set_title("Every pair, mean over layers")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    modalities = [profile.modality for profile in found]
    for edge in [i for i in range(1, len(found)) if modalities[i] != modalities[i - 1]]:
        axes.axhline(edge - 0.5, color="white", linewidth=2)
        axes.axvline(edge - 0.5, color="white", linewidth=2)
    if len(found) <= _ANNOTATED_UP_TO:
        middle = (lowest + 1) / 2
        for i, j in np.ndindex(*matrix.shape):
            color = "white" if matrix[i, j] < middle else INK
            label = "1" if matrix[i, j] >= 0.995 else f"{matrix[i, j]:.2f}".lstrip("0")
            axes.text(j, i, label, ha="center", va="center", fontsize=6.5, color=color)
    return image
