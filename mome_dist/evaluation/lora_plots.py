"""How much the LLM's low-rank terms add, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mome_dist.adapters.lora import PREFIX
from mome_dist.adapters.terms import SHARED, by_number
from mome_dist.checkpoint.format import CheckpointReader
from mome_dist.evaluation.style import INK, LINE_STYLES, grid, shades, styled
from mome_dist.training_log import Floats

_NAME = re.compile(rf"model/({PREFIX}\.(\d+)\.([qv])\.(\w+))\.a")
_TITLES = {"q": "queries", "v": "values"}
_COLOR = "#1f6fb4"


def term_norms(checkpoint: Path, scale: float) -> dict[str, dict[str, Floats]]:
    """Frobenius norms of ``scale B A`` of every term: by "q" or "v", then by the term's name, one for each layer.

    Args:
        checkpoint: a checkpoint's directory.
        scale: that the terms are multiplied by.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    with CheckpointReader(checkpoint) as reader:
        for match in filter(None, map(_NAME.fullmatch, reader.names(f"model/{PREFIX}."))):
            a, b = (reader.read(f"model/{match[1]}.{factor}") for factor in "ab")
            of_term = found.setdefault(match[3], {}).setdefault(match[4], {})
            of_term[int(match[2])] = scale * product_norm(a, b)
    return {
        projection: {term: np.array([norm for _, norm in sorted(layers.items())]) for term, layers in terms.items()}
        for projection, terms in found.items()
    }


def product_norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of ``B A`` for A [r, in] and B [out, r], from two products of r by r."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def term_norm_figure(norms: Mapping[str, Mapping[str, Floats]]) -> Figure:
    """The norms of `term_norms`: a panel for queries and one for values, a line for each term."""
    with styled():
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        panels = figure.subplots(1, len(norms), squeeze=False, sharey=True)
        for axes, (projection, terms) in zip(panels.flat, sorted(norms.items()), strict=True):
            names = sorted(terms, key=by_number)
            for number, (term, shade) in enumerate(zip(names, shades(_COLOR, len(names)), strict=True)):
                line: dict[str, Any] = {"color": shade, "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
                if term == SHARED:  # what the others are compared with
                    line = {"color": INK, "linestyle": "-"}
                axes.plot(terms[term], label=term.replace("_", " "), marker="o", ms=2.5, **line)
            axes.set_title(_TITLES[projection])
            axes.set_xlabel("layer")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            grid(axes)
        panels.flat[0].set_ylabel("norm of what is added to the weights")
        panels.flat[-1].legend(title="term")
    return figure
