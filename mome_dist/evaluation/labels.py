"""Labels of points that lie close together: each gets the nearest place where it covers nothing.

matplotlib writes a label where it is told, whatever is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mome_dist.evaluation.style import INK, MUTED

_FONT_SIZE = 7.0
_DISTANCES = (4, 8, 13, 19, 26, 34, 43, 53, 64)  # points, from a point to the nearest edge or corner of its label
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_NEAR = 8  # points: a label farther away gets a line to its point
_MARGIN = 1.0  # points between labels, and half of what a marker is wide beyond its line
_ALIGNED = {-1: "right", 0: "center", 1: "left"}, {-1: "top", 0: "center", 1: "bottom"}


@dataclass(frozen=True)
class Labelled:
    """A point with its label, in data coordinates; ``low`` to ``high`` is the vertical bar through it."""

    x: float
    y: float
    low: float
    high: float
    text: str


def add_labels(figure: Figure, panels: Sequence[tuple[Axes, Sequence[Labelled]]]) -> None:
    """Write the labels of all points of all panels; everything else of the figure has been drawn before.

    A label lies within its axes, on no other label, and on no marker or bar unless there is no room for that. What is
    written is left out of the figure's layout, which would move the points under it.
    """
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # limits and layout as they will be
    pixels = figure.dpi / 72
    for axes, points in panels:
        limits = axes.get_xlim(), axes.get_ylim()
        axes.set(xlim=limits[0], ylim=limits[1])
        taken: list[Bbox] = []
        marks = [mark for point in points for mark in _marks(axes, point, pixels)]
        # From the top right: labels go there first, and those that follow have what is left.
        for point in sorted(points, key=lambda point: (-point.y, -point.x)):
            taken.append(_place(axes, canvas, point, taken, marks, pixels))


def _marks(axes: Axes, point: Labelled, pixels: float) -> list[Bbox]:
    """What of a point and its bar may not be covered, in pixels."""
    (x, y), (_, low), (_, high) = axes.transData.transform(
        [(point.x, point.y), (point.x, point.low), (point.x, point.high)]
    )
    marker, bar = 2.5 * pixels, 1.0 * pixels
    return [Bbox([[x - marker, y - marker], [x + marker, y + marker]]), Bbox([[x - bar, low], [x + bar, high]])]


def _place(
    axes: Axes, canvas: FigureCanvasAgg, point: Labelled, taken: Sequence[Bbox], marks: Sequence[Bbox], pixels: float
) -> Bbox:
    """Write a label; the box that it takes, in pixels."""
    label = axes.annotate(
        point.text,
        (point.x, point.y),
        (0, 0),
        textcoords="offset points",
        fontsize=_FONT_SIZE,
        color=INK,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        annotation_clip=False,
    )
    label.set_in_layout(False)
    size = Text.get_window_extent(label, canvas.get_renderer())  # without its line
    at = axes.transData.transform((point.x, point.y))
    found: list[tuple[float, int, Bbox, tuple[int, int, int]]] = []
    for distance in _DISTANCES:
        for right, up in _DIRECTIONS:
            box = _box(at, (size.width, size.height), distance * pixels, right, up)
            covered = sum(_overlap(box, other) for other in taken)
            price = 1e6 * covered + 1e3 * _outside(box, axes.bbox) + sum(_overlap(box, mark) for mark in marks)
            found.append((round(price, 3), len(found), box, (distance, right, up)))  # no price for rounding
            if not found[-1][0]:
                break
        if not found[-1][0]:
            break
    _, _, box, (distance, right, up) = min(found, key=lambda each: each[:2])
    label.set_position((distance * right, distance * up))
    label.set(ha=_ALIGNED[0][right], va=_ALIGNED[1][up])
    if distance <= _NEAR:
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(False)
    return box.padded(_MARGIN * pixels)


def _box(at: Sequence[float], size: tuple[float, float], distance: float, right: int, up: int) -> Bbox:
    """Where a label of a size lies that is moved away from a point."""
    edges = []
    for middle, length, side in zip(at, size, (right, up), strict=True):
        start = middle + side * distance - length * (1 - side) / 2
        edges.append((start, start + length))
    (left, end), (bottom, top) = edges
    return Bbox([[left, bottom], [end, top]])


def _overlap(one: Bbox, other: Bbox) -> float:
    """Pixels that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    """Pixels of a box beyond a frame."""
    return box.width * box.height - _overlap(box, frame)
