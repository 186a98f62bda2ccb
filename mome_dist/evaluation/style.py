"""The look that all figures share: colours by task and modality, quiet axes, one way to save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mome_dist.files import written_aside

TASK_COLORS = {"asr": "#1f6fb4", "vsr": "#d9722b", "avsr": "#2e8b68"}
MODALITY_COLORS = {"audio": "#1f6fb4", "video": "#d9722b", "text": "#6b6b6b", "audio against video": "#b9a3c9"}
# Of runs beside each other, from Okabe and Ito's palette, which the colour-blind tell apart.
RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK, MUTED, FAINT = "#222222", "#777777", "#c9c9c9"
LINE_STYLES = ("-", "--", "-.", ":")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
}
DPI = 150


def styled() -> AbstractContextManager[None]:
    """The context in which figures are made."""
    return rc_context(STYLE)  # type: ignore[arg-type]


def grid(axes: Axes, axis: str = "y") -> None:
    """Light lines to read values off."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0, pad=5)  # less, and the first labels of the two axes touch


def legend_beside(figure: Figure) -> None:
    """The legend of a figure's first axes at the right of all of them, in as many columns as its height asks for."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    rows = int(figure.get_figheight() / 0.18)
    figure.legend(handles, labels, loc="outside right upper", ncols=-(-len(labels) // rows))


def shades(color: str, count: int) -> list[tuple[float, float, float]]:
    """``count`` tints of a colour, the full one first: finest rate darkest."""
    red, green, blue = to_rgb(color)
    weights = [1 - 0.55 * number / max(count - 1, 1) for number in range(count)]
    return [(1 - w * (1 - red), 1 - w * (1 - green), 1 - w * (1 - blue)) for w in weights]


def view_colors(views: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour for each view name: the task's hue, paler from view to view."""
    colors: dict[str, tuple[float, float, float]] = {}
    for task, color in TASK_COLORS.items():
        of_task = [view for view in views if view.startswith(f"{task}(")]
        colors |= dict(zip(of_task, shades(color, len(of_task)), strict=True))
    return colors


def line_styles(views: Sequence[str]) -> dict[str, str]:
    """Within a task, views differ by stroke as well as by tint."""
    seen: dict[str, int] = {}
    styles = {}
    for view in views:
        task = view.split("(")[0]
        styles[view] = LINE_STYLES[seen.get(task, 0) % len(LINE_STYLES)]
        seen[task] = seen.get(task, 0) + 1
    return styles


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; the same figure gives the same bytes."""
    with written_aside(path) as temporary, styled():
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None})
