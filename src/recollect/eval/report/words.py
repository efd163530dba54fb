"""The chapter on recall: how much, at what price, where it breaks, how it was learned and what was attended to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from recollect.eval.report.attended import (
    AttendedLayer,
    attending_layers,
    draw_attended,
    draw_needed_bars,
    load_attended,
    pattern_colour,
)
from recollect.eval.report.data import FaceOff, Row
from recollect.eval.report.figures import bar_height, draw_accuracy_bars, draw_gap_bars
from recollect.eval.report.maps import (
    differences,
    draw_difference,
    draw_table_heat,
    draw_whole_by_size,
    map_size,
    whole_by_size,
)
from recollect.eval.report.plates import WIDE, Figure, Plate, curve_plates, figure, scores, titled, whiskers
from recollect.eval.report.published import published_for
from recollect.eval.report.rows import Panel, crowded, look, panels
from recollect.eval.report.scatter import draw_price_scatter
from recollect.eval.report.text import guesser_phrase, percent

NEEDED = "Is the needed key among those read?"


def recall_plates(face: FaceOff, group: str) -> list[Plate]:
    """Every plate of the chapter that the runs give data for."""
    rows = face.ranked(group)
    plates = [
        *_score_plates(face, group, rows),
        *_gap_plates(face, rows),
        *_map_plates(face, group, rows),
        *_whole_plates(face, rows),
    ]
    return [*plates, *curve_plates(face, group, "accuracy"), *_attended_plates(face, rows)]


def _score_plates(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    line, published = face.line(group), published_for(face.name)
    dashed = f" Dashed: {guesser_phrase(face, group)}, {percent(line)}." if line is not None else ""
    shown = panels(face, rows)
    bars = tuple(
        figure(
            titled("Accuracy", panel.title),
            partial(draw_accuracy_bars, face=face, panel=panel, published=published.accuracy if published else None),
            scores(panel.rows),
            max(250.0, bar_height(max(len(each.rows) for each in shown))) if len(shown) == 1 else _height(panel),
        )
        for panel in shown
    )
    width, height = (WIDE, 430.0) if crowded(face) else (400.0, max(250.0, bar_height(len(rows))))
    scatters = tuple(
        figure(
            f"Accuracy against {name}",
            partial(draw_price_scatter, face=face, price=price, group=group),
            f"Accuracy against {name}, one labelled point per backbone",
            height,
            width=width,
        )
        for price, name in (("state_bytes", "state"), ("params", "parameters"))
        if any(row.field(price) for row in rows)
    )
    diamonds = f" Diamonds: {published.source}." if published else ""
    caption = f"Bars: values recalled right, best first.{whiskers(rows)}{dashed}{diamonds}"
    if scatters:
        caption += (
            " Points: the same accuracy against the bytes a backbone carries from one position to the next, and "
            "against its parameters; up and to the left is better."
        )
    return [Plate("How much is recalled, and at what price", caption, (*bars, *scatters))]


def _gap_plates(face: FaceOff, rows: Sequence[Row]) -> list[Plate]:
    figures = tuple(
        figure(
            titled("Context-binding gap", panel.title),
            partial(draw_gap_bars, face=face, panel=panel),
            "; ".join(f"{r.name} {percent(gap.mean)}" for r in panel.rows if (gap := r.metric("binding_gap"))),
            _height(panel),
        )
        for panel in panels(face, rows)
        if any(row.metric("binding_gap") for row in panel.rows)
    )
    caption = (
        "Accuracy less that of the guesser that knows everything but the context. At zero a backbone knows which "
        f"values go with a key, and not in which context.{whiskers(rows)}"
    )
    return [Plate("How much of it is bound to its context", caption, figures)] if figures else []


def _map_plates(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    celled = [row for row in rows if row.detail("cells")]
    if not celled:
        return []

    def drawn(row: Row, base: Row | None) -> Figure:
        width, height = map_size(row)
        draw = partial(draw_table_heat, row=row) if base is None else partial(draw_difference, row=row, base=base)
        title = row.name if base is None else f"{row.name} less {base.name}"
        colour = look(face, row.name).colour
        return figure(title, draw, f"Accuracy of {title} by table size", height, width=width, colour=colour)

    form = "small" if all(map_size(row)[0] <= 230 for row in celled) else "medium"
    axes = celled[0].detail("cells")[0]["axes"]
    up = f" Upwards: {' x '.join(axes[:-1])};" if len(axes) > 1 else ""
    caption = (
        f"Each square is one size of the sample.{up} to the right: {axes[-1]}. The fuller the colour, the more "
        "of it is recalled; all maps share one scale, from 0 (empty) to 100 % (full)."
    )
    plates = [
        Plate("Where it breaks: accuracy by table size", caption, tuple(drawn(row, None) for row in celled), form)
    ]
    pairs = differences(face, group)
    if pairs:
        caption = (
            "The best row of each mixer that adds attention, less the mixer alone, in points of accuracy: blue where "
            "attention gains, orange where it loses."
        )
        plates.append(Plate("What attention adds, by table size", caption, tuple(drawn(*pair) for pair in pairs), form))
    return plates


def _whole_plates(face: FaceOff, rows: Sequence[Row]) -> list[Plate]:
    figures = tuple(
        figure(
            titled("Samples without a mistake", panel.title),
            partial(draw_whole_by_size, face=face, panel=panel),
            f"Share of samples without a mistake by the number of answers, {panel.title or 'all rows'}",
            max(240.0, 75.0 + 13.0 * len(panel.rows)),
        )
        for panel in panels(face, rows)
        if any(whole_by_size(row)[0].size for row in panel.rows)
    )
    caption = (
        "A sample counts only if every answer in it is right; to the right, samples ask for more answers. The mean "
        "over sizes that ask for as many, and over seeds."
    )
    return [Plate("Whole tables, as they grow", caption, figures)] if figures else []


def _attended_plates(face: FaceOff, rows: Sequence[Row]) -> list[Plate]:
    reading = [row for row in rows if attending_layers(row)]
    plates: list[Plate] = []
    told = [row for row in reading if (seen := load_attended(row)) is not None and seen.weight is not None]
    if told:
        figures = tuple(
            figure(
                titled("Needed key", panel.title),
                partial(draw_needed_bars, face=face, panel=panel),
                "; ".join(f"{row.name}: {_shares_text(row)}" for row in panel.rows),
                _height(panel) + 8.0 * len(panel.rows),
            )
            for panel in panels(face, told)
        )
        caption = (
            "For each asked position, the place where its value was told, or one of the two after it, to which the "
            "mixer may have carried it. Pale: how often a query may read it; solid: the attention weight it gets; "
            "both in the layer and at the place that get most, in the sample drawn below. A value may be found in "
            "other ways, so a low bar is a hint and no proof."
        )
        plates.append(Plate(NEEDED, caption, figures))
    pictures = tuple(_picture(seen) for row in reading if (seen := load_attended(row)) is not None)
    if pictures:
        caption = (
            "One sample; asked keys downwards, told tokens to the right. The fuller the colour, the more attention "
            "weight; an outline encloses the keys that a pattern admits; the dot is the value that is needed. "
            f"Outlines: {_outlines(pictures_of=reading)}."
        )
        plates.append(Plate("What each query attends to", caption, pictures))
    return plates


def _picture(seen: AttendedLayer) -> Figure:
    patterns = " + ".join(seen.patterns)
    title = f"{seen.row}, attention {seen.number + 1} ({patterns})"
    width = max(400.0, WIDE if len(seen.told) > 30 else 0.0)
    colour = pattern_colour(seen.patterns[0]) if len(seen.patterns) == 1 else None
    alt = f"What {title} attends to"
    return figure(
        title, partial(draw_attended, seen=seen), alt, 60.0 + 12.0 * len(seen.queries), width=width, colour=colour
    )


def _outlines(pictures_of: Sequence[Row]) -> str:
    kinds = dict.fromkeys(p for row in pictures_of for layer in attending_layers(row) for p in layer["patterns"])
    names = ("blue", "vermilion", "green", "pink", "ochre", "sky blue", "violet", "brown", "dark", "grey")
    return ", ".join(f"{kind} {names[pattern_colour(kind)]}" for kind in kinds)


def _shares_text(row: Row) -> str:
    """A row's shares in words: what its best layer admits, by pattern, and the weight."""
    seen = load_attended(row)
    if seen is None:
        return ""
    parts = ", ".join(f"{name} {percent(seen.admitted(p))}" for p, name in enumerate(seen.patterns))
    return f"admitted {percent(seen.admitted())} ({parts}), weight {percent(seen.weight or 0.0)}"


def _height(panel: Panel) -> float:
    return bar_height(len(panel.rows))
