"""Labels of points that lie close together: each gets the nearest place where it covers nothing.

matplotlib writes a label where it is told, whatever is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
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


# Labels are placed one after the other; of these orders the one counts that needs the least room.
_ORDERS: tuple[Callable[[Labelled], tuple[float, float]], ...] = (
    lambda point: (-point.y, -point.x),
    lambda point: (point.y, point.x),
    lambda point: (point.x, point.y),
    lambda point: (-point.x, point.y),
)


@dataclass(frozen=True)
class _Place:
    """Where a label goes: the box that it takes, in pixels, and how it lies to its point; what it costs to be there."""

    box: Bbox
    distance: int
    right: int
    up: int
    price: float


def add_labels(figure: Figure, panels: Sequence[tuple[Axes, Sequence[Labelled]]]) -> None:
    """Write the labels of all points of all panels; everything else of the figure has been drawn before.

    A label lies within its axes, on no other label, and on no marker or bar unless there is no room for that. What is
    written is left out of the figure's layout, which would move the points under it.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # limits and layout as they will be
    pixels = figure.dpi / 72
    for axes, points in panels:
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        written = [_written(axes, point) for point in points]
        # Without its line, which is a part of an annotation's extent.
        sizes = [Text.get_window_extent(label, renderer).size for label in written]
        marks = [mark for point in points for mark in _marks(axes, point, pixels)]
        plans = []
        for key in _ORDERS:
            order = sorted(range(len(points)), key=lambda number: key(points[number]))
            plans.append(_plan(axes, points, sizes, order, marks, pixels))
        best = min(plans, key=lambda plan: sum(place.price + place.distance for place in plan.values()))
        for number, place in best.items():
            label = written[number]
            label.set_position((place.distance * place.right, place.distance * place.up))
            label.set(ha=_ALIGNED[0][place.right], va=_ALIGNED[1][place.up])
            assert label.arrow_patch is not None
            label.arrow_patch.set_visible(place.distance > _NEAR)


def _written(axes: Axes, point: Labelled) -> Annotation:
    """A label with a line to its point, not at its place yet."""
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
    return label


def _plan(
    axes: Axes,
    points: Sequence[Labelled],
    sizes: Sequence[Sequence[float]],
    order: Sequence[int],
    marks: Sequence[Bbox],
    pixels: float,
) -> dict[int, _Place]:
    """Places of all labels, by number: in an order, each the nearest free one, or the cheapest where none is free."""
    plan: dict[int, _Place] = {}
    for number in order:
        at = axes.transData.transform((points[number].x, points[number].y)).tolist()
        taken = [place.box.padded(_MARGIN * pixels) for place in plan.values()]
        found: list[_Place] = []
        for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
            box = _box(at, sizes[number], distance * pixels, right, up)
            price = 1e6 * sum(_overlap(box, other) for other in taken) + 1e3 * _outside(box, axes.bbox)
            price = round(price + sum(_overlap(box, mark) for mark in marks), 3)  # no price for rounding
            found.append(_Place(box, distance, right, up, price))
            if not price:
                break
        plan[number] = min(found, key=lambda place: place.price)
    return plan


def _marks(axes: Axes, point: Labelled, pixels: float) -> list[Bbox]:
    """What of a point and its bar may not be covered, in pixels."""
    (x, y), (_, low), (_, high) = axes.transData.transform(
        [(point.x, point.y), (point.x, point.low), (point.x, point.high)]
    )
    marker, bar = 2.5 * pixels, 1.0 * pixels
    return [Bbox([[x - marker, y - marker], [x + marker, y + marker]]), Bbox([[x - bar, low], [x + bar, high]])]


def _box(at: Sequence[float], size: Sequence[float], distance: float, right: int, up: int) -> Bbox:
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
