"""Pictures of the long-context evaluation: heat maps of length by depth, and perplexity by position."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from recollect.core.errors import RecollectError
from recollect.eval.bench.figures import spread
from recollect.eval.report.figures import PRINT, ROW_COLOURS, Palette, require_matplotlib, settings
from recollect.eval.report.rows import MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Results = Mapping[str, Mapping[str, Any]]
"""What ``evaluate_long`` or ``perplexity_by_position`` returned, by the name of the model."""

CELL, TALL = 0.42, 0.25
"""Inches of a cell of a heat map, across and down."""

LABELS = 1.0
"""Inches beside a row of maps for its depths and its name."""

CLOSEST = 12.0
"""Points between the names of two lines."""

MAX_NATS = 5.0
"""Where a map of -log p is white: about that of one letter in 150."""


def draw_heat_maps(
    results: Results,
    *,
    score: Literal["found", "exact", "nll"] = "found",
    tasks: Sequence[str] | None = None,
    trained_at: int | None = None,
    title: str = "",
) -> bytes:
    """A PNG with a row of maps for every task and a column for every model; length goes right, depth goes down.

    The fuller the colour the better, on one scale everywhere: shares are written in per cent, ``nll`` in nats. What was
    not measured, or does not fit its length, is an empty cell. A line follows the last length up to ``trained_at``.
    Raises RecollectError when nothing was measured, or without matplotlib.
    """
    matplotlib = require_matplotlib()
    rows = {name: [row for row in result["rows"] if row["status"] == "measured"] for name, result in results.items()}
    known = list(dict.fromkeys(row["task"] for found in rows.values() for row in found))
    tasks = [task for task in (known if tasks is None else tasks) if task in known]
    if not tasks:
        raise RecollectError("heat maps: no case was measured")
    lengths = sorted({row["length"] for found in rows.values() for row in found if row["task"] in tasks})
    depths = {task: depths_of(row for found in rows.values() for row in found if row["task"] == task) for task in tasks}
    heights = [TALL * len(depths[task]) + 0.22 for task in tasks]
    panel = CELL * len(lengths)
    width = LABELS + 0.7 + len(rows) * (panel + 0.22)
    height = sum(heights) + 1.35 + (0.4 if title else 0.0)
    with matplotlib.rc_context(settings(PRINT, 9.0)):
        figure = matplotlib.figure.Figure(figsize=(width, height), dpi=110, facecolor=PRINT.paper)
        top = height - 0.42 - (0.4 if title else 0.0)
        for task, tall in zip(tasks, heights, strict=True):
            for j, (name, found) in enumerate(rows.items()):
                box = (LABELS + 0.7 + j * (panel + 0.22), top - tall + 0.2, panel, TALL * len(depths[task]))
                ax = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
                mine = [row for row in found if row["task"] == task]
                draw_map(ax, PRINT, mine, lengths, depths[task], score)
                if trained_at is not None:
                    mark_trained(ax, PRINT, lengths, trained_at)
                if task == tasks[0]:
                    ax.set_title(name, fontsize=10, color=PRINT.ink, pad=6)
                if task != tasks[-1]:
                    ax.set_xticklabels([])
                if j:
                    ax.set_yticklabels([])
                else:
                    named = "\n".join(wrap(task, 13))
                    at = (0.012, (box[1] + box[3] / 2) / height)
                    figure.text(*at, named, fontsize=9.5, color=PRINT.ink, va="center")
            top -= tall
        _caption(figure, score, title, trained_at, height)
        return _png(figure)


def draw_positions(
    results: Results,
    *,
    bins: Literal["geometric", "linear"] = "geometric",
    trained_at: int | None = None,
    per_byte: Mapping[str, float] | None = None,
    after: int = 16,
    title: str = "",
) -> bytes:
    """A PNG of nats per token by tokens read before, a line for every model, named at its end; bands are standard
    errors. ``per_byte`` gives bytes per token where tokenizers differ: nats are then those of a byte. Bins that
    end before position ``after`` are left out: there every model knows as little.

    Raises RecollectError when there is nothing to draw, or without matplotlib.
    """
    matplotlib = require_matplotlib()
    lines = {name: [row for row in result[bins] if row["to"] > after] for name, result in results.items()}
    if not all(lines.values()):
        raise RecollectError(f"perplexity by position: there is nothing to draw from position {after} on")
    with matplotlib.rc_context(settings(PRINT)):
        figure = matplotlib.figure.Figure(figsize=(9.0, 5.2), dpi=110, facecolor=PRINT.paper)
        figure.subplots_adjust(left=0.085, right=0.8, bottom=0.13, top=0.9 if title else 0.96)
        ax = figure.subplots()
        ends: list[tuple[float, float, str, str]] = []
        drawn: list[float] = []
        for i, (name, rows) in enumerate(lines.items()):
            scale = 1.0 if per_byte is None else 1.0 / per_byte[name]
            x = np.array([centre(row["from"], row["to"], bins) for row in rows])
            y = np.array([scale * row["nats"] for row in rows])
            error = np.array([scale * (row["se"] or 0.0) for row in rows])
            colour = ROW_COLOURS[i % len(ROW_COLOURS)]
            marker = MARKERS[(i + i // len(ROW_COLOURS)) % len(MARKERS)]
            ax.plot(x, y, color=colour, marker=marker, markevery=max(1, len(x) // 8), ms=4.5, lw=1.5)
            ax.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
            ends.append((float(x[-1]), float(y[-1]), name, colour))
            drawn += x.tolist()
        if bins == "geometric":
            octaves(ax, drawn)
        else:
            step = 1 << max(0, int(np.ceil(np.log2(max(drawn) / 8))))
            ticks = list(range(0, int(max(drawn)) + 1, step))
            ax.set_xticks(ticks, [f"{value:,}" for value in ticks])
            ax.minorticks_off()
        if trained_at is not None:
            ax.axvline(trained_at, color=PRINT.ink, linewidth=1, linestyle=(0, (4, 3)))
            ax.text(trained_at, 1.005, f"trained at {trained_at:,}", transform=ax.get_xaxis_transform(), ha="center")
        ax.set_xlabel("tokens read before")
        ax.set_ylabel("nats per token" if per_byte is None else "nats per byte")
        if title:
            ax.set_title(title, loc="left", fontsize=12, pad=18 if trained_at is not None else 6)
        _name_ends(ax, ends)
        return _png(figure)


def octaves(ax: Axes, drawn: Iterable[float], most: int = 9) -> None:
    """A logarithmic x axis for tokens, with at most ``most`` powers of two written."""
    ax.set_xscale("log", base=2)
    ticks = sorted({1 << int(np.log2(value)) for value in drawn})
    ticks = ticks[:: max(1, -(-len(ticks) // most))]
    ax.set_xticks(ticks, [f"{value:,}" for value in ticks])
    ax.minorticks_off()


def depths_of(rows: Iterable[Mapping[str, Any]]) -> list[float | None]:
    """The depths that a task was asked at, or the one entry None where it has no depth."""
    found = {row["depth"] for row in rows}
    return [None] if found == {None} else sorted(depth for depth in found if depth is not None)


def draw_map(
    ax: Axes,
    palette: Palette,
    rows: Iterable[Mapping[str, Any]],
    lengths: Sequence[int],
    depths: Sequence[float | None],
    score: str,
    top: float = 0.0,
) -> None:
    """The cells of one task from ``top`` downwards, and the axes' limits and names if they are to hold it alone."""
    from matplotlib.patches import Rectangle

    for row in rows:
        if row["depth"] not in depths:
            continue
        value = float(row[score])
        full = min(max(1.0 - value / MAX_NATS if score == "nll" else value, 0.0), 1.0)
        i, j = top + depths.index(row["depth"]), lengths.index(row["length"])
        ax.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=palette.heat, alpha=full, linewidth=0))
        text = str(round(100 * value)) if score != "nll" else f"{value:.{2 if value < 1 else 1}f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8.5)
    for i in range(len(depths)):
        for j in range(len(lengths)):
            edge = Rectangle((j - 0.48, top + i - 0.48), 0.96, 0.96, fill=False, edgecolor=palette.rule, lw=0.6)
            ax.add_patch(edge)
    ax.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
    ax.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    ax.set_yticks(range(len(depths)), [depth_name(depth) for depth in depths])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=8)


def depth_name(depth: float | None) -> str:
    """As the maps' rows are called."""
    return "any" if depth is None else f"{100 * depth:.0f} %"


def mark_trained(ax: Axes, palette: Palette, lengths: Sequence[int], trained_at: int) -> None:
    """A line behind the last length up to the one trained at, where there are lengths on both sides."""
    seen = sum(length <= trained_at for length in lengths)
    if 0 < seen < len(lengths):
        ax.axvline(seen - 0.5, color=palette.ink, linewidth=1.2, linestyle=(0, (3, 2)), clip_on=False)


def _caption(figure: Figure, score: str, title: str, trained_at: int | None, height: float) -> None:
    said = {
        "found": "answers found in the greedy continuation, %",
        "exact": "answers right token by token when forced, %",
        "nll": "-log p of the answers, nats per token",
    }[score]
    notes = [said, "lengths go right, in tokens; depths go down"]
    if trained_at is not None:
        notes.append(f"dashed: the longest length up to the {trained_at:,} trained at")
    figure.text(0.012, 0.14 / height, "\n".join(notes), fontsize=8.5, color=PRINT.muted, va="bottom")
    if title:
        figure.text(0.012, 1 - 0.12 / height, title, fontsize=12, weight="bold", color=PRINT.ink, va="top")


def short(length: int) -> str:
    """2k, 512: lengths as they are called."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def centre(start: int, end: int, bins: str) -> float:
    """The middle of the positions from ``start`` to before ``end``; in octaves, the geometric one."""
    return float(np.sqrt(start * (end - 1))) if bins == "geometric" else (start + end - 1) / 2


def _name_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names in a column right of the lines, in the order of their ends, each led to its own."""
    figure: Any = ax.figure
    points = 72 * float(figure.get_size_inches()[1]) * float(ax.get_position().height)
    bottom, top = (float(v) for v in ax.yaxis.get_transform().transform(np.array(ax.get_ylim())))
    scaled = [float(v) for v in ax.yaxis.get_transform().transform(np.array([y for _, y, _, _ in ends]))]
    order = sorted(range(len(ends)), key=lambda i: scaled[i])
    wanted = [(scaled[i] - bottom) / (top - bottom) * points for i in order]
    placed = spread(wanted, min(CLOSEST, points / max(len(ends), 1)), points)
    for i, at in zip(order, placed, strict=True):
        x, y, name, colour = ends[i]
        ax.annotate(
            name,
            (x, y),
            (1.03, at / points),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=colour,
            annotation_clip=False,
            arrowprops={
                **{"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "color": colour, "shrinkA": 1, "shrinkB": 3},
                "relpos": (0, 0.5),
            },
        )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
