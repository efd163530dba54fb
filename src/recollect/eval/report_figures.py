"""The report's figures, drawn with matplotlib and returned as inline SVG without any address, date or random id.

Every colour is drawn as a stand-in and then replaced by a CSS variable, so that one SVG serves light and dark pages.
A backbone keeps its colour and marker in every figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.core.errors import RecollectError
from recollect.eval.report_data import Axis, FaceOff, Row, binned, mean_of_curves, mean_table
from recollect.eval.report_text import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 400.0
"""Width of a figure in SVG units; text is 11 of them, so it stays legible on a 360-pixel screen."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

ROW_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#b8588e", "#c98500"),
    *("#3a9ad9", "#5d4a9c", "#8c6d1f", "#39424c", "#8b949d"),
)
"""After Okabe and Ito: told apart with any common colour blindness. The page holds lighter steps for dark screens.
Colour is never alone: bars, points, maps and the ends of curves carry the backbone's name."""


@dataclass(frozen=True)
class Palette:
    """Colours to draw with: real ones for a PNG, stand-ins for an SVG."""

    ink: str
    muted: str
    rule: str
    heat: str
    rows: tuple[str, ...]
    paper: str

    def row(self, face: FaceOff, name: str) -> str:
        """The colour of a backbone."""
        return self.rows[face.row_names.index(name) % len(self.rows)]


PRINT = Palette("#1d2329", "#5c6670", "#d9dde1", "#6aa5d8", ROW_COLOURS, "#ffffff")

_ROLES = ("ink", "muted", "rule", "heat", "paper", *(f"row-{i}" for i in range(len(ROW_COLOURS))))
_STAND_INS = {role: f"#fe01{i:02x}" for i, role in enumerate(_ROLES)}

SCREEN = Palette(
    *(_STAND_INS[role] for role in ("ink", "muted", "rule", "heat")),
    rows=tuple(_STAND_INS[f"row-{i}"] for i in range(len(ROW_COLOURS))),
    paper=_STAND_INS["paper"],
)


def require_matplotlib() -> Any:
    """The matplotlib module. Raises RecollectError where the extra ``report`` is not installed."""
    try:
        import_module("matplotlib.figure")
        return import_module("matplotlib")
    except ImportError:
        raise RecollectError("the report needs matplotlib and jinja2: pip install 'recollect[report]'") from None


def settings(palette: Palette, size: float = 11.0) -> dict[str, Any]:
    """Matplotlib parameters: quiet axes in the palette's colours, text as text, nothing read as mathematics."""
    return {
        "font.size": size,
        "font.family": "DejaVu Sans",
        "text.color": palette.ink,
        "text.parse_math": False,
        "axes.edgecolor": palette.rule,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": size,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.rule,
        "grid.linewidth": 0.7,
        "figure.facecolor": "none",
        "xtick.color": palette.rule,
        "ytick.color": palette.rule,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
    }


def svg(draw: Callable[[Axes, Palette], None], alt: str, *, height: float = 250.0, width: float = WIDTH) -> str:
    """One figure as an inline ``<svg>`` with ``alt`` as its label; the same input gives the same text."""
    from markupsafe import escape

    matplotlib = require_matplotlib()
    with matplotlib.rc_context({**settings(SCREEN), "svg.hashsalt": alt}):
        figure = matplotlib.figure.Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.subplots(), SCREEN)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*>", _opening(str(escape(alt)), width, height), text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    referenced = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referenced else "", text)
    for role, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", text)


def _opening(label: str, width: float, height: float) -> Callable[[re.Match[str]], str]:
    return lambda _: f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'


def bar_height(n_bars: int) -> float:
    """Height of a figure with that many horizontal bars."""
    return 64.0 + 24.0 * max(n_bars, 2)


def draw_accuracy_bars(ax: Axes, palette: Palette, face: FaceOff) -> None:
    """Recall accuracy per backbone, best on top, with the context-blind oracle as a line."""
    rows = face.ranked("recall")
    for y, row in enumerate(reversed(rows)):
        _bar(ax, palette, face, row, "accuracy", y, 0.64)
    _name_bars(ax, [row.name for row in reversed(rows)], palette)
    line = face.line("recall")
    if line is not None:
        _reference(ax, palette, line, f"context-blind {100 * line:.0f}")
    _percent_axis(ax, "accuracy, %")


def draw_reward_bars(ax: Axes, palette: Palette, face: FaceOff) -> None:
    """Reward accuracy per backbone: while observing (pale, above) and while imagining (solid, below)."""
    rows = face.ranked("world")
    for y, row in enumerate(reversed(rows)):
        _bar(ax, palette, face, row, "inference_accuracy", y + 0.2, 0.34, alpha=0.4)
        _bar(ax, palette, face, row, "imagination_accuracy", y - 0.2, 0.34)
    _name_bars(ax, [row.name for row in reversed(rows)], palette)
    chance = face.line("world")
    if chance is not None:
        _reference(ax, palette, chance, f"chance {100 * chance:.0f}")
    _percent_axis(ax, "reward predicted right, %")


def draw_state_scatter(ax: Axes, palette: Palette, face: FaceOff) -> None:
    """Recall accuracy against bytes of state per sequence, on a logarithmic axis."""
    rows = [row for row in face.ranked("recall") if row.field("state_bytes")]
    points: list[tuple[float, float]] = []
    for row in rows:
        score, size = row.score, row.field("state_bytes")
        assert score is not None
        assert size is not None
        points.append((size, 100 * score.mean))
        marker = MARKERS[face.row_names.index(row.name) % len(MARKERS)]
        error = None if score.std is None else 100 * score.std
        colour = palette.row(face, row.name)
        ax.errorbar(size, 100 * score.mean, yerr=error, fmt=marker, color=colour, ms=7, elinewidth=1, zorder=3)
    line = face.line("recall")
    if line is not None:
        ax.axhline(100 * line, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xscale("log", base=2)
    sizes = [x for x, _ in points]
    ax.set_xlim(min(sizes, default=1) / 2, max(sizes, default=1) * 2)
    ax.set_ylim(0, 108)
    ax.set_xlabel("state per sequence")
    ax.set_ylabel("accuracy, %")
    ax.minorticks_off()
    low, high = np.log2(ax.get_xlim())
    exponents = np.arange(np.ceil(low), np.floor(high) + 1, max(1.0, np.ceil((high - low) / 5)))
    ax.set_xticks(list(2.0**exponents), [human_bytes(size).replace(".0", "") for size in 2.0**exponents])
    _label_points(ax, points, [row.name for row in rows])


def draw_table_heat(ax: Axes, palette: Palette, row: Row) -> None:
    """Accuracy of one backbone by table size: the fuller the colour, the higher, on the same scale everywhere."""
    from matplotlib.patches import Rectangle

    table = mean_table(row.detail("cells"))
    assert table is not None, f"{row.name} reports no cells"
    accuracy = table["accuracy"]
    n_rows, n_columns = accuracy.shape
    for i, j in np.ndindex(n_rows, n_columns):
        if not np.isfinite(accuracy[i, j]):
            continue
        value = float(np.clip(accuracy[i, j], 0.0, 1.0))
        cell = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=palette.heat, alpha=value, linewidth=0)
        ax.add_patch(cell)
        if max(n_rows, n_columns) <= 8:
            ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=11)
    ax.set(xlim=(-0.5, n_columns - 0.5), ylim=(-0.5, n_rows - 0.5))
    ax.set(xlabel=table["axes"][-1], ylabel=" x ".join(table["axes"][:-1]))
    every = max(1, -(-max(n_rows, n_columns) // 8))
    ax.set_xticks(range(0, n_columns, every), [str(n) for n in table["columns"][::every]])
    ax.set_yticks(range(0, n_rows, every), table["rows"][::every])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def draw_curves(
    ax: Axes, palette: Palette, face: FaceOff, rows: Sequence[Row], name: str, axis: Axis, *, evaluation: bool
) -> None:
    """Learning curves: a bold mean over finished seeds, each seed thin; a run that has not finished is dotted."""
    drawn: list[float] = []
    ends: list[tuple[float, float, str]] = []
    for row in rows:
        colour = palette.row(face, row.name)
        for run in row.runs:
            x, y = binned(*run.curve(name, axis, evaluation=evaluation))
            alone = len(row.finished) < 2 and run.status == "finished"
            style = "-" if run.status == "finished" else ":"
            ax.plot(
                x, _shown(y, evaluation), style, color=colour, alpha=1.0 if alone else 0.4, lw=1.8 if alone else 0.9
            )
            drawn += list(y)
        x, y = binned(*row.mean_curve(name, axis, evaluation=evaluation))
        if len(row.finished) > 1:
            ax.plot(x, _shown(y, evaluation), "-", color=colour)
        if x.size:
            ends.append((float(x[-1]), float(_shown(y, evaluation)[-1]), row.name))
    if evaluation:
        ax.set_ylim(0, 105)
        line = face.line(rows[0].group)
        if line is not None:
            ax.axhline(100 * line, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
        _name_ends(ax, ends)
    elif drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        ax.set_yscale("log")
        ax.minorticks_off()
        # The default writes TeX, which text in an SVG shows as it stands.
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlim(left=0)
    ax.set_xlabel("training steps" if axis == "step" else "seconds of training")
    ax.set_ylabel("accuracy, %" if evaluation else "loss")
    ax.locator_params(axis="x", nbins=5)


def draw_horizon(ax: Axes, palette: Palette, face: FaceOff) -> None:
    """Squared error of imagined frames against the number of frames imagined so far."""
    ends: list[tuple[float, float, str]] = []
    for row in face.ranked("world"):
        curves = [np.asarray(curve, dtype=np.float64) for curve in row.detail("generation_mse_curve")]
        x, y = mean_of_curves(
            [(np.arange(1, curve.size + 1, dtype=np.float64), curve) for curve in curves if curve.size]
        )
        ax.plot(x, y, color=palette.row(face, row.name))
        if x.size:
            ends.append((float(x[-1]), float(y[-1]), row.name))
    ax.set(xlabel="frames imagined", ylabel="squared error per frame")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    _name_ends(ax, ends)


def _name_ends(ax: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """The backbone's name at the end of its curve; names that would meet are pushed apart."""
    bottom, top = ax.get_ylim()
    apart = 0.07 * (top - bottom)
    heights = sorted((y, x, name) for x, y, name in ends)
    placed: list[float] = []
    for y, _, _ in heights:
        placed.append(max(y, placed[-1] + apart) if placed else y)
    excess = max(placed[-1] - top, 0.0) if placed else 0.0
    for i in reversed(range(len(placed))):
        limit = placed[i + 1] - apart if i + 1 < len(placed) else placed[i] - excess
        placed[i] = min(placed[i], limit)
    for (y, x, name), height in zip(heights, placed, strict=True):
        ax.annotate(
            name, (x, y), (6, (height - y) / (top - bottom) * 150), textcoords="offset points", va="center", fontsize=9
        )


def _shown(y: Any, evaluation: bool) -> Any:
    return 100 * y if evaluation else y


def _bar(
    ax: Axes, palette: Palette, face: FaceOff, row: Row, metric: str, y: float, height: float, alpha: float = 1.0
) -> None:
    stat = row.metric(metric)
    if stat is None:
        return
    mean, std = 100 * stat.mean, 100 * (stat.std or 0.0)
    ax.barh(y, mean, height, color=palette.row(face, row.name), alpha=alpha, linewidth=0)
    if std:
        ax.plot([mean - std, mean + std], [y, y], color=palette.ink, linewidth=1)
    ax.text(max(mean, mean + std) + 1.5, y, f"{mean:.0f}", va="center", fontsize=_small(ax))


def _name_bars(ax: Axes, names: Sequence[str], palette: Palette) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0, labelcolor=palette.ink)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)


def _reference(ax: Axes, palette: Palette, value: float, text: str) -> None:
    """A dashed line across horizontal bars, named above them."""
    ax.axvline(100 * value, color=palette.ink, linewidth=1, linestyle=(0, (4, 3)))
    top = ax.get_xaxis_transform()
    ax.text(100 * value, 1.01, text, transform=top, ha="center", va="bottom", fontsize=_small(ax))


def _small(ax: Axes) -> float:
    return float(ax.xaxis.label.get_fontsize()) - 1


def _percent_axis(ax: Axes, label: str) -> None:
    ax.set_xlim(0, 112)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel(label)


def _label_points(ax: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Names beside their points: the first of right, left, above and below that covers no point and no other name."""
    (low, high), (bottom, top) = np.log2(ax.get_xlim()), ax.get_ylim()
    places = [((np.log2(x) - low) / (high - low) * 330, (y - bottom) / (top - bottom) * 190) for x, y in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (x, y), (px, py), name in zip(points, places, names, strict=True):
        wide = 6.6 * len(name)
        offsets = (
            (8, 0, "left", "center", (px + 7, py - 6, px + 9 + wide, py + 6)),
            (-8, 0, "right", "center", (px - 9 - wide, py - 6, px - 7, py + 6)),
            (0, 8, "center", "bottom", (px - wide / 2, py + 7, px + wide / 2, py + 20)),
            (0, -8, "center", "top", (px - wide / 2, py - 20, px + wide / 2, py - 7)),
        )
        free = [o for o in offsets if _inside(o[4]) and not any(_overlap(o[4], other) for other in taken)]
        dx, dy, ha, va, box = (free or offsets)[0]
        taken.append(box)
        ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=10)


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= 330 and box[3] <= 190


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
