"""The report's figures, drawn with matplotlib and returned as inline SVG without any address, date or random id.

Every colour is drawn as a stand-in and then replaced by a CSS variable, so that one SVG serves light and dark pages.
A backbone keeps its colour and marker in every figure.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from recollect.core.errors import RecollectError
from recollect.eval.report.data import Axis, FaceOff, Row, Stat, binned
from recollect.eval.report.metrics import is_share, label
from recollect.eval.report.rows import OTHERS, Panel, crowded, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

End = tuple[float, float, str, str]
"""The last point of a curve, its name and its colour."""

WIDTH = 400.0
"""Width of a figure in SVG units; text is 11 of them, so it stays legible on a 360-pixel screen."""

NATS = "nats per token"
"""What the axis of a language model's loss is called."""

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
        return self.rows[look(face, name).colour]


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
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # saving would draw everything twice to work the layout out again
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*>", _opening(str(escape(alt)), width, height), text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    referenced = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referenced else "", text)
    # Two figures of one page may share their label, and never their names for clips and markers.
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|url\(#|href="#)([\w-]+)', rf"\1\2-{own}", text)
    for role, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{role})")
    # Hundredths of a unit are finer than any screen.
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\n\s*", "\n", text)


def _opening(label: str, width: float, height: float) -> Callable[[re.Match[str]], str]:
    return lambda _: f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'


def bar_height(n_bars: int) -> float:
    """Height of a figure with that many horizontal bars."""
    return 64.0 + 24.0 * max(n_bars, 2)


def draw_accuracy_bars(
    ax: Axes,
    palette: Palette,
    face: FaceOff,
    panel: Panel,
    published: Mapping[str, float] | None = None,
    *,
    all_guessers: bool = True,
) -> None:
    """Recall accuracy of a panel's rows, best on top, with lines for guessers and a diamond where one is published."""
    rows = panel.rows
    for y, row in enumerate(reversed(rows)):
        paper = (published or {}).get(row.name)
        bar(ax, palette, face, row, "accuracy", y, 0.64, beside=paper)
        if paper is not None:
            ax.plot(
                [100 * paper], [y], "D", ms=6, mfc=palette.paper, mec=palette.ink, mew=1.2, zorder=4, gid="published"
            )
    name_bars(ax, [panel.called(row) for row in reversed(rows)], palette)
    group = rows[0].group if rows else None
    if (guesser := face.guesser_of(group)) is not None:
        name, value = guesser
        reference(ax, palette, value, f"{name} {100 * value:.0f}", ha="left" if value < 0.6 else "right")
        uniform = face.oracles(group).get("uniform", value)
        if all_guessers and value - uniform > 0.14:
            reference(ax, palette, uniform, f"uniform {100 * uniform:.0f}")
    percent_axis(ax, "accuracy, %")


def draw_gap_bars(ax: Axes, palette: Palette, face: FaceOff, panel: Panel) -> None:
    """What each row scores beyond a guesser that knows everything but the context."""
    rows = [row for row in panel.rows if row.metric("binding_gap")]
    low = 0.0
    for y, row in enumerate(reversed(rows)):
        stat = row.metric("binding_gap")
        assert stat is not None
        bar(ax, palette, face, row, "binding_gap", y, 0.64)
        low = min(low, 100 * stat.low)
    name_bars(ax, [panel.called(row) for row in reversed(rows)], palette)
    ax.axvline(0, color=palette.ink, linewidth=1)
    ax.set_xlim(low - (9 if low else 0), 108)
    ax.set_xlabel("accuracy beyond the context-blind guesser, points")


def draw_curves(
    ax: Axes, palette: Palette, face: FaceOff, panel: Panel, name: str, axis: Axis, *, evaluation: bool
) -> None:
    """Learning curves: a bold mean over finished seeds, each seed thin; a run that has not finished is dotted."""
    drawn: list[float] = []
    ends: list[End] = []
    rows, scale = panel.rows, 100.0 if evaluation and is_share(name) else 1.0
    nats = bool(rows) and rows[0].family == "language"
    for row in rows:
        colour, alike = palette.row(face, row.name), crowded(face) and panel.title != OTHERS
        line_style = "-" if alike else look(face, row.name).line
        for run in row.runs:
            x, y = binned(*run.curve(name, axis, evaluation=evaluation))
            alone = len(row.finished) < 2 and run.status == "finished"
            ax.plot(
                x,
                scale * y,
                linestyle=line_style if run.status == "finished" else ":",
                color=colour,
                alpha=1.0 if alone else 0.4,
                lw=1.8 if alone else 0.9,
            )
            drawn += list(y)
        x, y = binned(*row.mean_curve(name, axis, evaluation=evaluation))
        if len(row.finished) > 1:
            ax.plot(x, scale * y, linestyle=line_style, color=colour)
        if x.size:
            ends.append((float(x[-1]), float(scale * y[-1]), panel.called(row), colour))
    if scale == 100:
        ax.set_ylim(0, 105)
        line = face.line(rows[0].group)
        if line is not None:
            ax.axhline(100 * line, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
    elif drawn and min(drawn) > 0 and ((evaluation and not nats) or max(drawn) > 20 * min(drawn)):
        logarithmic(ax, "y", drawn)
    if evaluation:
        name_ends(ax, ends)
    ax.set_xlim(left=0)
    ax.set_xlabel("training steps" if axis == "step" else "seconds of training")
    ax.set_ylabel("loss" if not evaluation else "accuracy, %" if scale == 100 else NATS if nats else label(name))
    ax.locator_params(axis="x", nbins=5)


def name_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Names in one column right of the curves, each led to its end; names that would meet are pushed apart."""
    from matplotlib.transforms import offset_copy

    scaled = ax.yaxis.get_transform().transform
    bottom, top = (float(y) for y in scaled(ax.get_ylim()))
    figure = ax.get_figure()
    assert figure is not None
    tall = 72 * figure.get_figure(root=True).get_figheight() - 65.0  # what is left for the axes, in points
    apart = 10.5 / tall * (top - bottom)
    heights = sorted((float(scaled(y)), y, x, name, colour) for x, y, name, colour in ends)
    right, offset = max((x for x, *_ in ends), default=0.0), 6.0 if len(ends) < 6 else 16.0
    placed: list[float] = []
    for at, *_ in heights:
        placed.append(max(at, placed[-1] + apart) if placed else at)
    excess = max(placed[-1] - top, 0.0) if placed else 0.0
    for i in reversed(range(len(placed))):
        limit = placed[i + 1] - apart if i + 1 < len(placed) else placed[i] - excess
        placed[i] = min(placed[i], limit)
    for (at, y, x, name, colour), height in zip(heights, placed, strict=True):
        place = (offset, (height - at) / (top - bottom) * tall)
        ax.annotate(name, (right, y), place, textcoords="offset points", va="center", fontsize=9)
        if abs(place[1]) > 3 or x < right:
            lead = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            beside = offset_copy(ax.transData, figure.get_figure(root=True), offset - 2, place[1], units="points")
            ax.annotate("", (x, y), (right, y), textcoords=beside, arrowprops=lead)


def logarithmic(ax: Axes, axis: Literal["x", "y"], values: Iterable[float]) -> None:
    """A logarithmic axis for positive ``values`` with plain numbers, at least two of them however near they are."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(values := list(values)), max(values)
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    side = ax.xaxis if axis == "x" else ax.yaxis
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 3 * low else tuple(n / 2 for n in range(2, 20))
    side.set_major_locator(LogLocator(subs=steps, numticks=8))
    # The default writes TeX, which text in an SVG shows as it stands.
    side.set_major_formatter(lambda value, _: f"{value:g}")
    side.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def bar(
    ax: Axes,
    palette: Palette,
    face: FaceOff,
    row: Row,
    metric: str,
    y: float,
    height: float,
    alpha: float = 1.0,
    beside: float | None = None,
) -> None:
    """The bar of a share, its whisker and its number, which stays clear of a mark at ``beside``."""
    if (stat := row.metric(metric)) is not None:
        share_bar(ax, palette, palette.row(face, row.name), stat, y, height, alpha, beside)


def share_bar(
    ax: Axes,
    palette: Palette,
    colour: str,
    stat: Stat,
    y: float,
    height: float,
    alpha: float = 1.0,
    beside: float | None = None,
    gap: float = 1.5,
) -> None:
    """``bar`` of any share, in any colour; its number follows after ``gap`` per cent."""
    mean, std = 100 * stat.mean, 100 * (stat.std or 0.0)
    ax.barh(y, mean, height, color=colour, alpha=alpha, linewidth=0)
    if std:
        ax.plot([mean - std, mean + std], [y, y], color=palette.ink, linewidth=1)
    end = mean + std if mean >= 0 else max(0.0, mean + std)
    if beside is not None and end - 2 < 100 * beside < end + 9:
        end = 100 * beside + 2
    ax.text(end + gap, y, f"{mean:.0f}", va="center", fontsize=_small(ax))


def name_bars(ax: Axes, names: Sequence[str], palette: Palette) -> None:
    """Names on the axis of horizontal bars, lowest first."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0, labelcolor=palette.ink)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)


def reference(
    ax: Axes, palette: Palette, value: float, text: str, ha: Literal["left", "center", "right"] = "center"
) -> None:
    """A dashed line across horizontal bars, named above them."""
    ax.axvline(100 * value, color=palette.ink, linewidth=1, linestyle=(0, (4, 3)))
    top = ax.get_xaxis_transform()
    ax.text(100 * value, 1.01, text, transform=top, ha=ha, va="bottom", fontsize=_small(ax))


def _small(ax: Axes) -> float:
    return float(ax.xaxis.label.get_fontsize()) - 1


def percent_axis(ax: Axes, label: str) -> None:
    """Shares from nothing to all, along the bars."""
    ax.set_xlim(0, 112)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel(label)
