"""How the gradients of the views agree, rate against rate, in experts and routers (`conflicts.jsonl`)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mome_dist.evaluation.style import INK, styled
from mome_dist.training_log import ConflictLog, Floats

_ANNOTATED_UP_TO = 16


def conflict_figure(log: ConflictLog) -> Figure:
    """Mean cosine between the gradients of every two views: of experts (left) and routers (right), on one scale from
    -1 to 1."""
    side = max(2.6, 0.42 * len(log.views))
    with styled():
        figure = Figure(figsize=(2 * side + 3.2, side + 1.5), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name, values in zip(panels, ("Experts", "Router"), (log.experts, log.router), strict=True):
            image = _matrix(axes, log.views, values)
            axes.set_title(name)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=30, pad=0.02)
        bar.set_label("cosine between gradients")
        bar.outline.set_visible(False)
        return figure


def _matrix(axes: Axes, views: tuple[str, ...], values: Floats) -> AxesImage:
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_yticks(range(len(views)), views, fontsize=8)
    axes.set_xticks(range(len(views)), views, fontsize=8, rotation=90)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(views) <= _ANNOTATED_UP_TO:
        for i, j in np.ndindex(*values.shape):
            if np.isfinite(values[i, j]):
                color = "white" if abs(values[i, j]) > 0.7 else INK
                axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6.5, color=color)
    return image
