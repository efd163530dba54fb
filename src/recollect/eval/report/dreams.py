"""Figures of world models: what is still known in a dream, and how frames drift from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recollect.eval.report.data import FaceOff, Floats, Row, binned, mean_of_curves
from recollect.eval.report.figures import (
    End,
    Palette,
    bar,
    logarithmic,
    name_bars,
    name_ends,
    percent_axis,
    reference,
)
from recollect.eval.report.metrics import label
from recollect.eval.report.published import published_worlds
from recollect.eval.report.rows import look
from recollect.eval.report.text import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS = {
    "imagination_accuracy": "inference_accuracy",
    "doors_accuracy": "view_accuracy",
    "walls_accuracy": None,
}
"""Shares that are drawn as solid bars, and those drawn pale above them."""

AXES = {
    "imagination_accuracy": "reward predicted right, %",
    "doors_accuracy": "doors right (pale: tiles right), %",
    "walls_accuracy": "walls probed right, %",
}

DECADES = 6
"""How far below the largest error an axis goes: an error of zero is drawn at its end."""


def draw_share_bars(ax: Axes, palette: Palette, face: FaceOff, group: str, metric: str) -> None:
    """A share per backbone, solid, over the one that goes with it, pale; diamonds where one is published."""
    rows, pale = [row for row in face.ranked(group) if row.metric(metric)], PAIRS[metric]
    published = published_values(face, group, metric)
    for y, row in enumerate(reversed(rows)):
        both = pale is not None and row.metric(pale) is not None
        if both and pale is not None:
            bar(ax, palette, face, row, pale, y + 0.2, 0.34, alpha=0.4)
        at, paper = y - 0.2 if both else y, published.get(row.name)
        bar(ax, palette, face, row, metric, at, 0.34 if both else 0.6, beside=paper)
        if paper is not None:
            _diamond(ax, palette, 100 * paper, at)
    name_bars(ax, [row.name for row in reversed(rows)], palette)
    chance = face.line(group) if metric == face.headline(group) else None
    if chance is not None:
        reference(ax, palette, chance, f"chance {100 * chance:.0f}")
    percent_axis(ax, AXES[metric])


def draw_error_dots(ax: Axes, palette: Palette, face: FaceOff, group: str, metric: str) -> None:
    """An error per backbone on a logarithmic axis, best on top; diamonds where one is published."""
    rows = [row for row in face.ranked(group) if row.metric(metric)]
    published = published_values(face, group, metric)
    found = [(row, stat) for row in rows if (stat := row.metric(metric))]
    values = above_zero([stat.mean for _, stat in found])
    papers = [value for row, _ in found if (value := published.get(row.name))]
    ax.set_xscale("log")
    for y, ((row, stat), value) in enumerate(zip(reversed(found), reversed(values), strict=True)):
        drawn, colour = look(face, row.name), palette.row(face, row.name)
        if stat.std:
            ax.plot([max(stat.low, value / 10), stat.mean + stat.std], [y, y], color=palette.ink, linewidth=1, zorder=2)
        ax.plot([value], [y], drawn.marker, color=colour, ms=7, zorder=3)
        ax.annotate(significant(stat.mean), (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        if (paper := published.get(row.name)) is not None:
            _diamond(ax, palette, paper, y)
    name_bars(ax, [row.name for row, _ in reversed(found)], palette)
    ax.set_ylim(-0.6, len(found) - 0.25)
    if values:
        logarithmic(ax, "x", [*values, *papers])
        low, high = min(*values, *papers, np.inf), max(*values, *papers, 0.0)
        ax.set_xlim(low / 1.6, high * 1.6)
    ax.set_xlabel(label(metric))


def draw_horizon(ax: Axes, palette: Palette, face: FaceOff, group: str, key: str = "generation_mse_curve") -> None:
    """Squared error of dreamed frames against the number of frames dreamed so far, on a logarithmic axis."""
    _draw_errors(ax, palette, face, [(row, *mean_curve(row, key, 1)) for row in face.ranked(group)])
    ax.set(xlabel="frames imagined", ylabel="squared error per frame")


def draw_rebuilt(ax: Axes, palette: Palette, face: FaceOff, group: str) -> None:
    """Squared error of frames decoded from what was seen of them, over the whole episode; a line ends the context."""
    _draw_errors(
        ax, palette, face, [(row, *mean_curve(row, "reconstruction_mse_curve", 1)) for row in face.ranked(group)]
    )
    context = context_of(face, group)
    if context is not None:
        ax.axvline(context, color=palette.ink, linewidth=1, linestyle=(0, (4, 3)))
        where = ax.get_xaxis_transform()
        ax.text(context, 1.01, "end of the context", transform=where, ha="center", va="bottom", fontsize=9)
    ax.set(xlabel="frame of the episode", ylabel="squared error per frame")


def mean_curve(row: Row, key: str, first: int) -> tuple[Floats, Floats]:
    """Mean over seeds of a curve of ``details``, its points numbered from ``first`` on."""
    curves = [np.asarray(curve, dtype=np.float64) for curve in row.detail(key)]
    return mean_of_curves([(first + np.arange(c.size, dtype=np.float64), c) for c in curves if c.size])


def context_of(face: FaceOff, group: str) -> float | None:
    """Frames of the context, where the runs say so."""
    return next((float(c) for row in face.groups[group] for c in row.detail("context")), None)


def published_values(face: FaceOff, group: str, metric: str) -> dict[str, float]:
    """What has been published of a metric in a group's environment or a related one, by row."""
    beside = published_worlds(face.environment(group))
    return beside.tables[metric].values if beside is not None and metric in beside.tables else {}


def above_zero(values: Sequence[float]) -> list[float]:
    """Errors as a logarithmic axis can show them: none below ``DECADES`` under the largest."""
    floor = max(values, default=1.0) * 10.0**-DECADES or 1.0
    return [max(value, floor) for value in values]


def _draw_errors(ax: Axes, palette: Palette, face: FaceOff, curves: Sequence[tuple[Row, Floats, Floats]]) -> None:
    ends: list[End] = []
    shown = [(row, *binned(x, y)) for row, x, y in curves if x.size]
    highest = max((float(y.max()) for _, _, y in shown), default=1.0)
    drawn: list[float] = []
    for row, x, y in shown:
        y = np.maximum(y, highest * 10.0**-DECADES or 1.0)
        ax.plot(x, y, color=palette.row(face, row.name), linestyle=look(face, row.name).line)
        ends.append((float(x[-1]), float(y[-1]), row.name, palette.row(face, row.name)))
        drawn += y.tolist()
    if drawn:
        logarithmic(ax, "y", drawn)
    ax.set_xlim(left=0)
    name_ends(ax, ends)


def _diamond(ax: Axes, palette: Palette, x: float, y: float) -> None:
    ax.plot([x], [y], "D", ms=6, mfc=palette.paper, mec=palette.ink, mew=1.2, zorder=4, gid="published")
