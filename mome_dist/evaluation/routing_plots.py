"""Figures of the routing that training logged by view (task and rates): where tokens went, and how alike views are.

`mome_dist.evaluation.activation_plots` shows the same for test utterances and single modalities; these figures need no
evaluation, and count text tokens too.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from mome_dist.evaluation.consistency import agreement_of_views
from mome_dist.evaluation.style import INK, styled
from mome_dist.training_log import Floats, RoutingLog

_COLUMNS = 4  # panels beside one another
_ANNOTATED_UP_TO = 16


def view_load_figure(log: RoutingLog) -> Figure:
    """Load of each expert in every layer, in multiples of an even share: one panel a view, one colour scale.

    The scale ends at the 99.5th percentile, so that single peaks do not hide the rest.
    """
    views, layers, experts = log.asked_by_view.shape
    totals = log.asked_by_view.sum(axis=-1, keepdims=True)
    loads = experts * log.asked_by_view / np.maximum(totals, 1)
    top = max(float(np.percentile(loads, 99.5)), 1.5)
    columns = min(views, _COLUMNS)
    rows = math.ceil(views / columns)
    panel_width, panel_height = max(1.9, min(3.2, 0.095 * experts)), max(1.3, min(2.8, 0.075 * layers))
    with styled():
        size = (max(1.9 + panel_width * columns, 4.6), max(0.9 + (0.25 + panel_height) * rows, 3.0))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for number, axes in enumerate(panels.flat):
            if number >= views:
                axes.set_visible(False)
                continue
            image = axes.pcolormesh(
                np.arange(experts + 1) - 0.5,
                np.arange(layers + 1) - 0.5,
                loads[number],
                cmap="magma_r",
                vmin=0,
                vmax=top,
            )
            axes.set_title(log.views[number])
            axes.tick_params(length=2, labelbottom=number >= views - columns)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(6, integer=True))
            if number >= views - columns:
                axes.set_xlabel("expert")
            if number % columns == 0:
                axes.set_ylabel("layer", color=INK)
        panels[0][0].set_ylim(layers - 0.5, -0.5)
        extend = "max" if loads.max() > top else "neither"
        bar = figure.colorbar(image, ax=panels, shrink=0.9, aspect=30, pad=0.02, extend=extend)
        bar.set_label("load of the expert\n(1 = an even share)")
        bar.ax.axhline(1, color=INK, linewidth=1)
        bar.outline.set_visible(False)
        return figure


def view_agreement_figure(log: RoutingLog) -> Figure:
    """Agreement of expert loads between every two views: mean over layers (left), and in each layer (right)."""
    agreement_VVL = agreement_of_views(log)
    views, layers = len(log.views), agreement_VVL.shape[-1]
    pairs = list(combinations(range(views), 2))
    by_layer = np.array([agreement_VVL[pair] for pair in pairs])
    lowest = min(0.9, float(np.floor(10 * by_layer.min()) / 10))
    side, tall = max(2.6, 0.36 * views), max(2.6, 0.15 * len(pairs))
    wide = max(2.6, min(7.0, 0.16 * layers))
    with styled():
        figure = Figure(figsize=(side + wide + 4.6, max(side, tall) + 1.3), layout="constrained")
        matrix, map_ = figure.subplots(1, 2, width_ratios=[side, wide])
        image = _matrix(matrix, log, agreement_VVL.mean(axis=-1), lowest)
        map_.imshow(by_layer, cmap="viridis", vmin=lowest, vmax=1, aspect="auto", interpolation="nearest")
        names = [f"{log.views[a]}  {log.views[b]}" for a, b in pairs]
        map_.set_yticks(range(len(pairs)), names, fontsize=7)
        map_.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        map_.set(title="Every pair, by layer", xlabel="layer")
        map_.spines[:].set_visible(False)
        map_.tick_params(length=0)
        bar = figure.colorbar(image, ax=[matrix, map_], shrink=0.8, aspect=30, pad=0.02)
        bar.set_label("agreement (1 - JSD)")
        bar.outline.set_visible(False)
        return figure


def _matrix(axes: Axes, log: RoutingLog, values: Floats, lowest: float) -> AxesImage:
    image = axes.imshow(values, cmap="viridis", vmin=lowest, vmax=1)
    axes.set_yticks(range(len(log.views)), log.views, fontsize=8)
    axes.set_xticks(range(len(log.views)), log.views, fontsize=8, rotation=90)
    axes.set_title("Mean over layers")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(log.views) <= _ANNOTATED_UP_TO:
        for i, j in np.ndindex(*values.shape):
            color = "white" if values[i, j] < (lowest + 1) / 2 else INK
            label = "1" if values[i, j] >= 0.995 else f"{values[i, j]:.2f}".lstrip("0")
            axes.text(j, i, label, ha="center", va="center", fontsize=6.5, color=color)
    return image
