"""The chapter on text: how well it is foretold, what is found again in long contexts and where, how it was learned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from recollect.eval.long_pictures import centre, depth_name, depths_of, draw_map, mark_trained, octaves, short
from recollect.eval.report.data import FaceOff, Row, Stat
from recollect.eval.report.figures import NATS, End, Palette, bar_height, name_bars, name_ends, share_bar
from recollect.eval.report.language import (
    PLAIN,
    band,
    chosen,
    longest,
    maps,
    plain_row,
    positions,
    share_found,
    suite_lengths,
    told,
    with_value,
)
from recollect.eval.report.plates import Figure, Plate, curve_plates, figure, whiskers
from recollect.eval.report.rows import look
from recollect.eval.report.text import loss_text, share_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHED = (0, (4, 3))

LINE = 18.0
"""Points of a line of a map."""

THIRD = 350.0
"""Width of figures of which three stand side by side."""


def language_plates(face: FaceOff, group: str) -> list[Plate]:
    """Every plate of the chapter that the runs give data for."""
    rows = face.ranked(group)
    return [
        _foretold(face, group, rows),
        *_found(face, group, rows),
        *_maps(face, group, rows),
        *curve_plates(face, group, face.headline(group)),
    ]


def draw_loss_dots(ax: Axes, palette: Palette, face: FaceOff, group: str) -> None:
    """Loss per row, lowest on top."""
    scored = with_value(face.ranked(group), lambda row: row.score)
    low = min(stat.low for _, stat in scored)
    high = max(2 * stat.mean - stat.low for _, stat in scored)
    size = float(ax.xaxis.label.get_fontsize()) - 2
    for y, (row, stat) in enumerate(reversed(scored)):
        if stat.std:
            ax.plot([stat.low, stat.mean + stat.std], [y, y], color=palette.ink, linewidth=1, zorder=2)
        ax.plot([stat.mean], [y], look(face, row.name).marker, color=palette.row(face, row.name), ms=7, zorder=3)
        end = (stat.mean + (stat.std or 0.0), y)
        ax.annotate(f"{stat.mean:.3f}", end, (0.8 * size, 0), textcoords="offset points", va="center", fontsize=size)
    name_bars(ax, [row.name for row, _ in reversed(scored)], palette)
    figure_ = ax.get_figure(root=True)
    assert figure_ is not None
    first = low - 0.08 * max(high - low, 0.01)
    # The part of the axes that the last number takes, beside its dot.
    text = 4.5 * size / (72 * figure_.get_figwidth() * ax.get_position().width)
    ax.set_xlim(first, first + max(high - first, 0.01) / max(0.3, 1 - text))
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(NATS)


def draw_found_bars(ax: Axes, palette: Palette, face: FaceOff, group: str, length: int) -> None:
    """Share of the suite's answers found at a length, in the order of the losses."""
    shares = with_value(face.ranked(group), lambda row: share_found(row, length))
    ceiling = _ceiling([stat for _, stat in shares])
    for y, (row, stat) in enumerate(reversed(shares)):
        share_bar(ax, palette, palette.row(face, row.name), stat, y, 0.64, gap=0.015 * ceiling)
    name_bars(ax, [row.name for row, _ in reversed(shares)], palette)
    ax.set_xlim(0, 1.12 * ceiling)
    ax.set_xlabel("answers found, %")


def draw_nats(ax: Axes, palette: Palette, face: FaceOff, group: str, less: Row | None = None) -> None:
    """Nats per token by tokens read before, at the greatest length, with a band of one deviation over seeds.

    ``less``: those of another row are taken off.
    """
    rows = [row for row in face.ranked(group) if row is not less]
    length = longest(rows)
    assert length is not None, f"{group} reports no loss by position"
    ends: list[End] = []
    drawn: list[float] = []
    for row in rows:
        seen = positions(row, length, less=less)
        if not seen.nats:
            continue
        x = np.array([centre(first, last + 1, "geometric") for first, last in zip(seen.first, seen.last, strict=True)])
        y, spread = band(seen.nats)
        colour, style = palette.row(face, row.name), look(face, row.name)
        ax.plot(x, y, color=colour, linestyle=style.line, marker=style.marker, ms=3.5, lw=1.5)
        if spread.any():
            ax.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)
        ends.append((float(x[-1]), float(y[-1]), row.name, colour))
        drawn += x.tolist()
    octaves(ax, drawn, most=6)
    if less is not None:
        ax.axhline(0, color=palette.ink, linewidth=1)
    mark_length(ax, palette, face, group, max(drawn))
    ax.set(xlabel="tokens read before", ylabel=NATS if less is None else f"{NATS}, less those of {less.name}")
    name_ends(ax, ends)


def draw_found(ax: Axes, palette: Palette, face: FaceOff, group: str) -> None:
    """Share of the suite's answers found by length, and what chance finds."""
    rows = face.ranked(group)
    ends: list[End] = []
    every: list[Stat] = []
    for row in rows:
        stats = {n: stat for n in suite_lengths([row]) if (stat := share_found(row, n))}
        if not stats:
            continue
        x, (y, spread) = np.array(list(stats)), band(list(stats.values()))
        colour, style = palette.row(face, row.name), look(face, row.name)
        ax.errorbar(
            x,
            100 * y,
            yerr=100 * spread if spread.any() else None,
            color=colour,
            linestyle=style.line,
            marker=style.marker,
            ms=5,
            lw=1.6,
            elinewidth=0.8,
        )
        ends.append((float(x[-1]), float(100 * y[-1]), row.name, colour))
        every += stats.values()
    lengths = suite_lengths(rows)
    if chances := _chances(rows):
        ax.plot(*zip(*((n, 100 * c) for n, c in chances), strict=True), color=palette.muted, lw=1, linestyle=DASHED)
    octaves(ax, [float(n) for n in lengths], most=6)
    ax.set_ylim(0, _ceiling(every))
    mark_length(ax, palette, face, group, max(lengths))
    ax.set(xlabel="length, tokens", ylabel="answers found, %")
    name_ends(ax, ends)


def mark_length(ax: Axes, palette: Palette, face: FaceOff, group: str, furthest: float) -> None:
    """A line at the length trained on, where more than that was tested."""
    trained = face.trained.get(group)
    if trained is None or trained >= furthest:
        return
    ax.axvline(trained, color=palette.ink, linewidth=1, linestyle=DASHED)
    top = ax.get_xaxis_transform()
    size = float(ax.xaxis.label.get_fontsize()) - 2
    ax.text(trained, 1.01, f"trained at {trained:,}", transform=top, ha="center", va="bottom", fontsize=size)


def draw_suite_maps(ax: Axes, palette: Palette, row: Row, shown: Sequence[Row], trained: int | None) -> None:
    """One row's share found: a map of length by depth for every task, one below the other.

    ``shown``: the rows whose maps stand beside it, which share their tasks, lengths and depths.
    """
    cases, mine = [case for each in shown for case in maps(each)], maps(row)
    lengths = sorted({case["length"] for case in cases})
    top, names, at = 1.0, list[str](), list[float]()
    for task in dict.fromkeys(case["task"] for case in cases):
        depths = depths_of(case for case in cases if case["task"] == task)
        own = (case for case in mine if case["task"] == task)
        draw_map(ax, palette, own, lengths, depths, "found", top)
        ax.text(-0.46, top - 0.95, task, va="center", ha="left", color=palette.ink, fontsize=9.5)
        names += [depth_name(depth) for depth in depths]
        at += [top + i for i in range(len(depths))]
        top += len(depths) + 1.2
    ax.set_yticks(at, names)
    ax.set_ylim(top - 1.6, -0.6)
    if trained is not None:
        mark_trained(ax, palette, lengths, trained)


def _foretold(face: FaceOff, group: str, rows: Sequence[Row]) -> Plate:
    tall = max(250.0, 90.0 + 15.0 * len(rows))
    told_ = "; ".join(f"{row.name} {loss_text(row.score)}" for row in rows)
    dots = partial(draw_loss_dots, face=face, group=group)
    figures = [figure("Loss on held-out text", dots, f"{NATS}: {told_}", tall, width=THIRD)]
    caption = f"Nats per token of documents that nothing was trained on, lowest first.{whiskers(rows)}"
    length, plain = longest(rows), plain_row(face, group)
    if length is not None:
        lines = partial(draw_nats, face=face, group=group)
        alt = f"{NATS} by the number of tokens read before, over documents of {length:,}: one line per row"
        figures.append(figure("Loss by what was read before", lines, alt, tall, width=THIRD))
        caption += (
            f" By position: in documents of {length:,} tokens, averaged over octaves; whatever a model keeps of its "
            "context makes the line fall."
        )
        if any(len(row.finished) > 1 for row in rows):
            caption += " Bands: one standard deviation over seeds."
        if plain is not None and len(rows) > 1 and positions(plain, length).nats:
            less = partial(draw_nats, face=face, group=group, less=plain)
            alt = f"The same less the nats of {PLAIN}: one line per row"
            figures.append(figure(f"The same, less {PLAIN}", less, alt, tall, width=THIRD))
            caption += f" Less {PLAIN}: seed by seed; below zero a row foretells more than the one without attention."
    return Plate("How well text is foretold", caption, tuple(figures), "medium" if len(figures) > 2 else "")


def _found(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    lengths = suite_lengths(rows)
    if not lengths:
        return []
    tall = max(250.0, 90.0 + 15.0 * len(rows), bar_height(len(rows)))
    longest_ = lengths[-1]
    said = "; ".join(f"{row.name} {share_text(share_found(row, longest_))}" for row in rows)
    bars = figure(
        f"Found at {longest_:,} tokens",
        partial(draw_found_bars, face=face, group=group, length=longest_),
        f"Per cent of answers found at {longest_:,} tokens: {said}",
        tall,
    )
    caption = "Answers of the long-context suite that stand in the greedy continuation, tasks weighing alike."
    caption += whiskers(rows)
    if len(lengths) == 1:
        return [Plate("What is found again in a long text", caption, (bars,))]
    alt = "Per cent of answers found by length: one line per row"
    if _chances(rows):
        caption += " Dashed curve: chance, which knows only the form of the answers."
    lines = figure("Found by length", partial(draw_found, face=face, group=group), alt, tall)
    return [Plate("What is found again in a long text", caption, (lines, bars))]


def _maps(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    picked = [(row, why) for row, why in chosen(rows) if maps(row)]
    if not picked:
        return []
    shown, trained = [row for row, _ in picked], face.trained.get(group)
    cases = [case for row in shown for case in maps(row)]
    tasks = {task: depths_of(c for c in cases if c["task"] == task) for task in {c["task"] for c in cases}}
    height = 30.0 + LINE * (sum(map(len, tasks.values())) + 1.2 * len(tasks))
    figures: list[Figure] = []
    for row, why in picked:
        title = f"{row.name}, {why}" if why else row.name
        draw = partial(draw_suite_maps, row=row, shown=shown, trained=trained)
        alt = f"Share of answers that {row.name} finds, by task, length and depth"
        colour = look(face, row.name).colour
        figures.append(figure(title, draw, alt, height, width=320.0, colour=colour))
    lengths = sorted({case["length"] for case in cases})
    caption = (
        "Answers found, %: the fuller the colour, the more. Lengths go to the right, in tokens; depths go down, from "
        "the beginning of the text to its end."
    )
    if trained is not None and lengths[0] <= trained < lengths[-1]:
        caption += f" Dashed: the last length up to the {short(trained)} trained on."
    return [Plate("Where in the text it is found", caption, tuple(figures), "medium")]


def _chances(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """What chance finds by length; nothing where that is below one per cent everywhere."""
    chances = [(n, chance) for n in suite_lengths(rows) if (chance := told(rows, "chance", length=n)) is not None]
    return chances if max((chance for _, chance in chances), default=0.0) >= 0.01 else []


def _ceiling(stats: Sequence[Stat]) -> float:
    """The end of an axis of shares in per cent: all, unless little is found."""
    highest = 100 * max((stat.mean + (stat.std or 0.0) for stat in stats), default=1.0)
    return 105.0 if highest > 60 else max(10.0, 1.2 * highest)
