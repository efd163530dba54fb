"""Accuracy by size of the sample: maps, maps of a difference, and how whole tables are lost as they grow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.eval.report.data import FaceOff, Floats, Row, mean_of_curves, mean_table
from recollect.eval.report.figures import End, Palette, name_ends
from recollect.eval.report.rows import OTHERS, PLAIN, Panel, added_to, look, mixer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 16
BINS_PER_OCTAVE = 3
"""Sizes that ask for different numbers of answers, beyond which neighbouring ones are averaged."""

MAX_NUMBERED = 16
"""Columns up to which a map writes its numbers."""


def map_size(row: Row) -> tuple[float, float]:
    """Width and height of a row's map, so that cells stay square enough and their numbers legible."""
    n_rows, n_columns = _table(row)["accuracy"].shape
    wide = 230.0 if n_columns <= 8 else 80.0 + 22.0 * n_columns
    unit = (wide - 50.0) / n_columns
    return wide, 52.0 + min(unit, 40.0 if n_rows == 1 else unit if n_rows <= 16 else 15.0) * n_rows


def draw_table_heat(ax: Axes, palette: Palette, row: Row) -> None:
    """Accuracy of one backbone by table size: the fuller the colour, the higher, on the same scale everywhere."""
    table = _table(row)
    _draw(ax, table, table["accuracy"], {1: palette.heat, -1: palette.heat})


def draw_difference(ax: Axes, palette: Palette, row: Row, base: Row) -> None:
    """Accuracy of ``row`` less that of ``base`` by size, in points: blue where it gains, orange where it loses."""
    mine, theirs = _table(row), _table(base)
    _draw(ax, mine, mine["accuracy"] - theirs["accuracy"], {1: palette.heat, -1: palette.rows[1]})


def differences(face: FaceOff, group: str = "recall") -> list[tuple[Row, Row]]:
    """For every mixer of a group the best row that adds attention to it, and the mixer alone.

    Only where both report the same sizes.
    """
    rows = [row for row in face.ranked(group) if row.detail("cells")]
    pairs: list[tuple[Row, Row]] = []
    for base in sorted(
        (row for row in rows if added_to(row.name) == PLAIN), key=lambda r: face.row_names.index(r.name)
    ):
        joined = [r for r in rows if mixer_of(r.name) == base.name and added_to(r.name) not in (PLAIN, "2x")]
        if joined and joined[0].detail("cells")[0]["sizes"] == base.detail("cells")[0]["sizes"]:
            pairs.append((joined[0], base))
    return pairs


def whole_by_size(row: Row) -> tuple[Floats, Floats]:
    """Answers per sample (the product of its size) and the share of samples without a mistake, mean over seeds."""
    curves: list[tuple[Floats, Floats]] = []
    for cells in (c for c in row.detail("cells") if "all_correct" in c):
        asked = np.array([math.prod(size) for size in cells["sizes"]], dtype=np.float64)
        whole = np.array(cells["all_correct"], dtype=np.float64)
        if np.unique(asked).size > MAX_POINTS:
            asked = 2 ** (np.round(BINS_PER_OCTAVE * np.log2(asked)) / BINS_PER_OCTAVE)
        x = np.unique(asked)
        curves.append((x, np.array([whole[asked == n].mean() for n in x])))
    return mean_of_curves(curves)


def draw_whole_by_size(ax: Axes, palette: Palette, face: FaceOff, panel: Panel) -> None:
    """Share of samples answered without a mistake against the number of answers they ask for."""
    ends: list[End] = []
    for row in panel.rows:
        x, y = whole_by_size(row)
        if x.size:
            drawn = look(face, row.name)
            style = drawn.line if panel.title == OTHERS else "-"
            ax.plot(x, 100 * y, linestyle=style, color=palette.row(face, row.name))
            ends.append((float(x[-1]), float(100 * y[-1]), panel.called(row), palette.row(face, row.name)))
    ax.set_xscale("log", base=2)
    low, high = ax.get_xlim()
    ticks = [2**e for e in range(12) if low <= 2**e <= high]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 105)
    ax.set(xlabel="answers asked for in one sample", ylabel="samples without a mistake, %")
    name_ends(ax, ends)


def _table(row: Row) -> dict[str, Any]:
    table = mean_table(row.detail("cells"))
    assert table is not None, f"{row.name} reports no cells"
    return table


def _draw(ax: Axes, table: dict[str, Any], values: Floats, colours: dict[int, str]) -> None:
    from matplotlib.patches import Rectangle

    n_rows, n_columns = values.shape
    large = max(n_rows, n_columns) > 8
    size = 8.5 if large else 11.0
    for i, j in np.ndindex(n_rows, n_columns):
        if not np.isfinite(values[i, j]):
            continue
        value = float(np.clip(values[i, j], -1.0, 1.0))
        colour = colours[1 if value >= 0 else -1]
        # Nothing inside the axes needs room: left out of the layout, a map takes a tenth of the time.
        cell = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=colour, alpha=abs(value), linewidth=0)
        ax.add_patch(cell).set_in_layout(False)
        if n_columns <= MAX_NUMBERED:
            text = str(round(100 * value))
            ax.text(j, i, text, ha="center", va="center", fontsize=size).set_in_layout(False)
    ax.set(xlim=(-0.5, n_columns - 0.5), ylim=(-0.5, n_rows - 0.5))
    ax.set(xlabel=table["axes"][-1], ylabel=" x ".join(table["axes"][:-1]))
    every = max(1, -(-n_columns // MAX_NUMBERED))
    ax.set_xticks(range(0, n_columns, every), [str(n) for n in table["columns"][::every]])
    every = max(1, -(-n_rows // 40))
    ax.set_yticks(range(0, n_rows, every), table["rows"][::every])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=size - (0.0 if large else 1.0))
