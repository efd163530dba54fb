"""Pictures of the benches: a PNG each, two or three panels over length or over tokens seen, on logarithmic axes.

Every line is named at its end. A peer is dashed, in the colour of the row of ours that it stands beside.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recollect.eval.bench.attention import FULL
from recollect.eval.bench.cases import Record, Row
from recollect.eval.bench.layers import best_of_families
from recollect.eval.bench.peers import BEST, PEERS
from recollect.eval.bench.worldmodel import FULL as TSSM_FULL
from recollect.eval.bench.worldmodel import TSSM
from recollect.eval.report.figures import PRINT, ROW_COLOURS, require_matplotlib, settings
from recollect.eval.report.rows import MARKERS
from recollect.eval.report.text import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (16.0, 9.0)
LABEL_POINTS = 9.5

CLOSEST = 13.0
"""Points between the names of two lines."""

NARROW = 1000.0
"""Below so many times from bottom to top, an axis shows 2 and 5 between its powers of ten."""

SHORT = {BEST: "transformers Mamba2*", "transformers Mamba2": "transformers Mamba2 (256)"}

Points = list[tuple[float, float]]


_TIE: Mapping[str, Any] = {
    **{"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
    "relpos": (0, 0.5),  # from the left edge of the name, not from its middle
}


@dataclass
class Line:
    """One line of a panel."""

    name: str
    points: Points
    colour: str
    marker: str
    dashed: bool = False
    beyond: Points = field(default_factory=list)
    """Drawn as dashes after the last point: not measured."""


def draw(record: Record) -> bytes | None:
    """The picture of a record as a PNG; None when it holds no numbers.

    Raises RecollectError where matplotlib is not installed.
    """
    rows = record.measured()
    if not rows:
        return None
    make = {"layers": _layers, "attention": _attention, "decode": _decode, "worldmodel": _worldmodel}[
        record.head["bench"]
    ]
    return make(record, rows)


def _layers(record: Record, rows: Sequence[Row]) -> bytes:
    shown = [row for row in rows if row["row"] not in PEERS]
    shown += [{**row, "row": name} for (name, _), row in best_of_families(rows).items()]
    notes = ["Dashed: a peer, in the colour of the row it compares with."]
    if any(row["row"] == BEST for row in shown):
        notes.append("* the fastest of chunks 32, 64 and 128 at each length.")
    ours = list(dict.fromkeys(row["row"] for row in shown if not row["peer_of"]))
    # What has a peer takes the first colours: only there must a colour be found again.
    paired = {row["peer_of"] for row in shown}
    style = {name: i for i, name in enumerate(sorted(ours, key=lambda name: name not in paired))}
    s = record.head["settings"]
    # Per token, since it grows about linearly: as lines of one slope nobody could tell them apart.
    shown = [{**row, "bytes_per_token": row["peak_bytes"] / (s["batch"] * row["length"])} for row in shown]
    memory = _lines(shown, "length", "bytes_per_token", style)
    panels = [
        ("forward and backward, tokens per second", _lines(shown, "length", "both_tokens_per_s", style), _number),
        ("peak memory of forward and backward, per token", memory, human_bytes),
    ]
    return _picture(record, f"d_model {s['d_model']}, batch {s['batch']}", "sequence length", panels, notes)


def _attention(record: Record, rows: Sequence[Row]) -> bytes:
    style = {name: i for i, name in enumerate(dict.fromkeys(row["row"] for row in rows))}
    longest = max(row["length"] for row in rows)
    time = _lines(rows, "length", "both_ms", style)
    notes: list[str] = []
    for line in time:
        if line.name == FULL and line.points[-1][0] < longest:
            (at, value), ahead = line.points[-1], [row["length"] for row in rows]
            line.beyond = [(n, value * (n / at) ** 2) for n in sorted({at, *ahead}) if n >= at]
            notes.append("Dashes go on with the square of the length: not measured.")
    notes += [
        f"{found['row']} overtakes full attention at {found['crossover']:,.0f}."
        for found in record.derived.get("summary", [])
        if found["row"] == "hax" and found["crossover"]
    ]
    s = record.head["settings"]
    panels = [
        ("forward and backward, milliseconds", time, _number),
        ("peak memory of forward and backward", _lines(rows, "length", "peak_bytes", style), human_bytes),
    ]
    what = f"{s['heads']} heads of {s['d_head']}, batch {s['batch']}"
    return _picture(record, what, "sequence length", panels, notes)


def _decode(record: Record, rows: Sequence[Row]) -> bytes:
    style = {name: i for i, name in enumerate(dict.fromkeys(row["row"] for row in rows))}
    growing = {row["row"] for row in rows if row["grows"]}
    kept = [row for row in rows if row["state_bytes"]]
    panels = [
        ("one more token, milliseconds", _lines(rows, "seen", "step_ms", style, growing), _number),
        ("state of one sequence", _lines(kept, "seen", "state_bytes", style, growing), human_bytes),
    ]
    notes = ["Dashed: the state is declared to grow with what was seen."] if growing else []
    return _picture(record, f"d_model {record.head['settings']['d_model']}", "tokens seen before", panels, notes)


def _worldmodel(record: Record, rows: Sequence[Row]) -> bytes:
    s = record.head["settings"]
    style = {name: i for i, name in enumerate(dict.fromkeys(row["row"] for row in rows if row["row"] != TSSM_FULL))}
    shown: list[Row] = [
        {
            **row,
            "peer_of": TSSM if row["row"] == TSSM_FULL else None,
            "bytes_per_frame": row["peak_bytes"] / (s["batch"] * row["length"]),
        }
        for row in rows
    ]
    panels = [
        ("training, frames per second", _lines(shown, "length", "train_frames_per_s", style), _number),
        ("imagination, frames per second", _lines(shown, "length", "imagine_frames_per_s", style), _number),
        ("peak memory of training, per frame", _lines(shown, "length", "bytes_per_frame", style), human_bytes),
    ]
    notes = [f"Imagined: {s['horizon']} frames after a context of that length."]
    if any(row["peer_of"] for row in shown):
        notes.append(f"Dashed: {TSSM} with a memory as long as the context.")
    side = s["image_size"]
    seen = "tiles" if side is None else f"{side} x {side} pixels"
    what = f"d_model {s['d_model']}, batch {s['batch']}, {seen}"
    return _picture(record, what, "frames of the episode or context", panels, notes)


def _lines(
    rows: Sequence[Row], size: str, value: str, style: Mapping[str, int], dashed: Iterable[str] = ()
) -> list[Line]:
    """A line per row name; ``style`` numbers the colours and markers of ours, peers take those of their row."""
    found: dict[str, Line] = {}
    for row in sorted(rows, key=lambda row: row[size]):
        name: str = row["row"]
        peer = bool(row.get("peer_of"))
        number = style.get(row["peer_of"] if peer else name, len(style))
        line = found.setdefault(
            name,
            Line(
                SHORT.get(name, name),
                [],
                ROW_COLOURS[number % len(ROW_COLOURS)],
                MARKERS[(number + number // len(ROW_COLOURS)) % len(MARKERS)],
                dashed=peer or name in dashed,
            ),
        )
        if row[value] > 0:
            line.points.append((row[size], row[value]))
    return [line for line in found.values() if line.points]


def _picture(
    record: Record,
    what: str,
    x_label: str,
    panels: Sequence[tuple[str, list[Line], Callable[[float], str]]],
    notes: Sequence[str],
) -> bytes:
    matplotlib = require_matplotlib()
    head = record.head
    threads = head["settings"]["threads"]
    facts = [
        f"{what}, {threads} thread{'s' * (threads != 1)}, float32",
        head["environment"]["device"],
        f"torch {head['environment']['packages']['torch']}",
        f"commit {str(head['commit'])[:12]}",
    ]
    with matplotlib.rc_context(settings(PRINT)):
        figure = matplotlib.figure.Figure(figsize=SIZE_INCHES, dpi=100, facecolor=PRINT.paper)
        figure.subplots_adjust(left=0.055, right=0.865, bottom=0.13, top=0.9, wspace=0.52)
        for ax, (title, lines, shown) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _panel(ax, title, x_label, lines, shown)
        figure.text(0.012, 0.962, f"recollect bench {head['bench']}", fontsize=15, weight="bold")
        figure.text(0.012, 0.033, "  ".join(notes), fontsize=11, color=PRINT.ink)
        figure.text(0.988, 0.962, "   |   ".join(facts), fontsize=10, color=PRINT.muted, ha="right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(ax: Axes, title: str, x_label: str, lines: Sequence[Line], shown: Callable[[float], str]) -> None:
    for line in lines:
        x, y = zip(*line.points, strict=True)
        style: Any = (0, (4, 2)) if line.dashed else "-"
        hollow: dict[str, Any] = {"markerfacecolor": PRINT.paper} if line.dashed else {}
        ax.plot(x, y, linestyle=style, color=line.colour, marker=line.marker, ms=4.5, lw=1.5, **hollow)
        if line.beyond:
            x, y = zip(*line.beyond, strict=True)
            ax.plot(x, y, linestyle=(0, (2, 3)), color=line.colour, lw=1.3)
    ax.set_xscale("log", base=2)
    in_bytes = shown is human_bytes
    ax.set_yscale("log", base=2 if in_bytes else 10)
    ax.set_title(title, loc="left", fontsize=12)
    ax.set_xlabel(x_label)
    ax.minorticks_off()
    at = sorted({x for line in lines for x, _ in (*line.points, *line.beyond)})
    every = max(1, math.ceil(len(at) / 6))
    ticks = at[::-1][::every][::-1]
    ax.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    if len(at) == 1:
        ax.set_xlim(at[0] / 2, at[0] * 2)
    values = [y for line in lines for _, y in (*line.points, *line.beyond)]
    ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
    if in_bytes:
        low, high = (math.log2(v) for v in ax.get_ylim())
        exponents = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 7)))
        between = [1.5 * 2.0**e for e in range(math.floor(low), math.ceil(high)) if len(exponents) < 3]
        bottom, top = ax.get_ylim()
        ax.set_yticks([tick for tick in (*(2.0**e for e in exponents), *between) if bottom <= tick <= top])
    else:
        low, high = ax.get_ylim()
        steps = (1, 2, 5) if high / low < NARROW else (1,)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ax.set_yticks([tick for e in decades for step in steps if low <= (tick := step * 10.0**e) <= high])
    ax.yaxis.set_major_formatter(lambda value, _: shown(value).replace(".0", ""))
    _name_ends(ax, lines)


def _name_ends(ax: Axes, lines: Sequence[Line]) -> None:
    """The name of every line in a column right of the panel, in the order of the ends, each tied to its end."""
    low, high = (math.log(v) for v in ax.get_ylim())
    figure: Any = ax.figure
    points = 72 * float(figure.get_size_inches()[1]) * float(ax.get_position().height)
    ends = sorted((((line.beyond or line.points)[-1], line) for line in lines), key=lambda end: end[0][1])
    wanted = [(math.log(y) - low) / (high - low) * points for (_, y), _ in ends]
    placed = spread(wanted, min(CLOSEST, points / max(len(ends), 1)), points)
    for ((x, y), line), height in zip(ends, placed, strict=True):
        ax.annotate(
            line.name,
            (x, y),
            (1.045, height / points),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL_POINTS,
            color=line.colour,
            annotation_clip=False,
            arrowprops={**_TIE, "color": line.colour},
        )


def spread(wanted: Sequence[float], apart: float, top: float) -> list[float]:
    """Rising heights moved as little as they may be to stand ``apart`` from each other, between 0 and ``top``.

    >>> spread([5.0, 6.0, 100.0], 10.0, 120.0)
    [0.5, 10.5, 100.0]
    """
    # Less their part of the distance, heights need only not fall: what falls is pooled at its mean.
    pools: list[tuple[float, int]] = []
    for i, height in enumerate(wanted):
        mean, n = height - i * apart, 1
        while pools and pools[-1][0] > mean:
            before, m = pools.pop()
            mean, n = (mean * n + before * m) / (n + m), n + m
        pools.append((mean, n))
    flat = [mean for mean, n in pools for _ in range(n)]
    highest = top - max(len(flat) - 1, 0) * apart
    return [max(0.0, min(mean, highest)) + i * apart for i, mean in enumerate(flat)]


def _number(value: float) -> str:
    """1, 20, 3k, 0.4M: as an axis shows it."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
