"""Accuracy against a price on a logarithmic axis, with every point named and no name on top of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recollect.eval.report.data import FaceOff
from recollect.eval.report.figures import Palette
from recollect.eval.report.rows import crowded, look
from recollect.eval.report.text import human_bytes, human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]

AXES = {"state_bytes": "state per sequence", "params": "parameters"}
"""Prices, and what their axis is called."""


class Place(NamedTuple):
    """Where a name goes, in points from its data point; ``far`` ones get a line to it."""

    dx: float
    dy: float
    ha: str
    va: str
    far: bool


def draw_price_scatter(ax: Axes, palette: Palette, face: FaceOff, price: str, group: str = "recall") -> None:
    """A group's recall accuracy against a price ("state_bytes" or "params"), up and to the left is better."""
    rows = [row for row in face.ranked(group) if row.field(price)]
    points: list[tuple[float, float]] = []
    for row in rows:
        score, size, drawn = row.score, row.field(price), look(face, row.name)
        assert score is not None
        assert size is not None
        points.append((size, 100 * score.mean))
        error = None if score.std is None else 100 * score.std
        ax.errorbar(
            size,
            100 * score.mean,
            yerr=error,
            fmt=drawn.marker,
            color=palette.row(face, row.name),
            ms=7,
            elinewidth=1,
            zorder=3,
        )
    line = face.line(group)
    if line is not None:
        ax.axhline(100 * line, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("log", base=2)
    sizes = [x for x, _ in points]
    margin = 2 if max(sizes, default=1) > 4 * min(sizes, default=1) else 1.5
    ax.set_xlim(min(sizes, default=1) / margin, max(sizes, default=1) * margin)
    ax.set_ylim(0, 108)
    ax.set_xlabel(AXES[price])
    ax.set_ylabel("accuracy, %")
    ax.minorticks_off()
    low, high = np.log2(ax.get_xlim())
    if price == "state_bytes":
        ticks = 2.0 ** np.arange(np.ceil(low), np.floor(high) + 1, max(1.0, np.ceil((high - low) / 5)))
        names = [human_bytes(size).replace(".0", "") for size in ticks]
    else:
        round_numbers = [m * 10.0**e for e in range(9) for m in (1, 1.5, 2, 3, 4, 5, 7)]
        ticks = np.array([n for n in round_numbers if low <= np.log2(n) <= high])
        ticks = ticks[:: max(1, -(-len(ticks) // 6))]
        names = [human_count(n) for n in ticks]
    ax.set_xticks(list(ticks), names)
    figure = ax.get_figure(root=True)
    assert figure is not None
    room = (72 * figure.get_figwidth() - 70, 72 * figure.get_figheight() - 60)
    size = 8.5 if crowded(face) else 10.0
    for row, point, place in zip(rows, points, places(ax, points, [r.name for r in rows], room, size), strict=True):
        arrow = {"arrowstyle": "-", "color": palette.muted, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        ax.annotate(
            row.name,
            point,
            (place.dx, place.dy),
            textcoords="offset points",
            ha=place.ha,
            va=place.va,
            fontsize=size,
            arrowprops=arrow if place.far else None,
        )


def places(
    ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], room: tuple[float, float], size: float
) -> list[Place]:
    """A place for every name: the nearest that covers no point and no other name, inside ``room`` (width, height).

    Where all are taken a name goes where it covers least.
    """
    (low, high), (bottom, top) = np.log2(ax.get_xlim()), ax.get_ylim()
    centres = [
        ((np.log2(x) - low) / (high - low) * room[0], (y - bottom) / (top - bottom) * room[1]) for x, y in points
    ]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    chosen: list[Place] = []
    for (x, y), name in zip(centres, names, strict=True):
        wide, tall = 0.64 * size * len(name) + 4, 1.25 * size
        found = [(box_of(x, y, place, wide, tall), place) for place in _candidates()]
        inside = [pair for pair in found if _inside(pair[0], room)] or found
        box, place = min(inside, key=lambda pair: sum(_shared(pair[0], other) for other in taken))
        taken.append(box)
        chosen.append(place)
    return chosen


def box_of(x: float, y: float, place: Place, wide: float, tall: float) -> Box:
    """The corners of a name of that size at its place."""
    left = x + place.dx - {"left": 0.0, "center": wide / 2, "right": wide}[place.ha]
    low = y + place.dy - {"bottom": 0.0, "center": tall / 2, "top": tall}[place.va]
    return left, low, left + wide, low + tall


def _candidates() -> list[Place]:
    near = [Place(8, 0, "left", "center", False), Place(-8, 0, "right", "center", False)]
    near += [Place(0, 7, "center", "bottom", False), Place(0, -7, "center", "top", False)]
    far: list[Place] = []
    for reach in (14, 24, 36, 50, 66, 84):
        for rise in (0.6, -0.6, 0.25, -0.25, 1.0, -1.0):
            far += [
                Place(reach, rise * reach, "left", "center", True),
                Place(-reach, rise * reach, "right", "center", True),
            ]
    return near + far


def _inside(box: Box, room: tuple[float, float]) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= room[0] and box[3] <= room[1]


def _shared(a: Box, b: Box) -> float:
    """The area two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
