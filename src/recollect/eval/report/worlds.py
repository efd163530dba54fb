"""The chapter on a world: what is known in a dream, how it drifts, how it was learned, what was attended to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from recollect.eval.report.attended_frames import draw_frames, frame_maps
from recollect.eval.report.data import FaceOff, Row
from recollect.eval.report.dreams import (
    AXES,
    PAIRS,
    draw_error_dots,
    draw_horizon,
    draw_rebuilt,
    draw_share_bars,
    published_values,
)
from recollect.eval.report.figures import bar_height
from recollect.eval.report.metrics import BEYOND, label
from recollect.eval.report.plates import Figure, Plate, curve_plates, figure, whiskers
from recollect.eval.report.published import published_worlds
from recollect.eval.report.rows import look
from recollect.eval.report.text import metric_text, percent

TITLES = {"imagination_accuracy": "Reward", "doors_accuracy": "Doors", "walls_accuracy": "Walls, probed"}

SAID = {
    "imagination_accuracy": (
        "Rewards predicted right: pale while the frames are shown, solid while they are imagined. A backbone that "
        "remembers keeps its solid bar as long as its pale one."
    ),
    "doors_accuracy": "Doors that a dream has open or locked as they are (solid), and tiles that are right (pale).",
    "walls_accuracy": "Walls of the whole maze that a probe reads off what the model knows.",
}


def world_plates(face: FaceOff, group: str) -> list[Plate]:
    """Every plate of the chapter that the runs give data for."""
    rows = face.ranked(group)
    logged = {name for row in rows for run in row.runs for entry in run.log for name in entry.get("eval") or {}}
    headline = face.headline(group)
    name = next((n for n in (headline, "inference_accuracy") if n in logged), headline)
    return [
        _known(face, group, rows),
        *_frames(face, group, rows),
        *_longer(face, group, rows),
        *curve_plates(face, group, name),
        *_attended(face, group, rows),
    ]


def _known(face: FaceOff, group: str, rows: Sequence[Row]) -> Plate:
    """Bars of every share that was asked for, dots of the other errors that rank or were probed."""
    reported = {name for row in rows for name in row.reported if row.metric(name)}
    height = max(250.0, bar_height(2 * len(rows)))
    headline = face.headline(group)
    errors = [name for name in (headline, "objects_mse") if name in reported and name not in AXES]
    shares = [name for name in PAIRS if name in reported]
    figures: list[Figure] = []
    said: list[str] = []
    for metric in sorted((*shares, *errors), key=lambda name: name != headline):
        is_bar = metric in AXES
        draw = partial(draw_share_bars if is_bar else draw_error_dots, face=face, group=group, metric=metric)
        title = TITLES[metric] if is_bar else label(metric).capitalize()
        figures.append(figure(title, draw, f"{group}: {_told(rows, metric)}", height))
        if is_bar:
            said.append(SAID[metric])
    if errors:
        said.append("Dots: errors on a logarithmic scale, further left is better.")
    caption = " ".join(said) + whiskers(rows)
    if headline in PAIRS and (chance := face.line(group)) is not None:
        caption += f" Dashed: chance, {percent(chance)}."
    ours, beside = {row.name for row in rows}, published_worlds(face.environment(group))
    if beside is not None and any(ours & published_values(face, group, m).keys() for m in (*shares, *errors)):
        caption += f" Diamonds are published: {beside.note.removeprefix('Published: ')}"
    if any(row.detail("generation_mse_curve") for row in rows):
        figures.append(_horizon(face, group, height))
        caption += " The error curves: squared error per frame as imagination goes on; a flat curve forgets nothing."
    return Plate("What is still known when the eyes are shut", caption, tuple(figures))


def _horizon(face: FaceOff, group: str, height: float, key: str = "generation_mse_curve") -> Figure:
    longer = ", longer than trained on" if key.startswith(BEYOND) else ""
    alt = f"Squared error of imagined frames against the number of frames imagined, {group}{longer}"
    return figure(
        "Error over the imagined horizon", partial(draw_horizon, face=face, group=group, key=key), alt, height
    )


def _frames(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    if not any(row.detail("reconstruction_mse_curve") for row in rows):
        return []
    alt = f"Squared error of frames decoded from what was seen of them, over the episode, {group}"
    height = max(250.0, 75.0 + 13.0 * len(rows))
    drawn = figure("Error of what is seen", partial(draw_rebuilt, face=face, group=group), alt, height)
    caption = (
        "Every frame is shown, understood and decoded again: what is left of the error when nothing has to be "
        "remembered. A dream can hardly be sharper than this."
    )
    return [Plate("How frames are rebuilt while they are shown", caption, (drawn,))]


def _longer(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    key = "longer_generation_mse_curve"
    if not any(row.detail(key) for row in rows):
        return []
    drawn = _horizon(face, group, max(250.0, 75.0 + 13.0 * len(rows)), key)
    caption = "The same weights, on a larger environment with longer episodes than any they were trained on."
    return [Plate("Beyond the trained horizon", caption, (drawn,))]


def _attended(face: FaceOff, group: str, rows: Sequence[Row]) -> list[Plate]:
    figures = tuple(
        figure(
            seen.title,
            partial(draw_frames, seen=seen),
            f"Which earlier frames {seen.title} attends to in {group}",
            250.0,
            width=320.0,
            colour=look(face, seen.row).colour,
        )
        for row in rows
        for seen in frame_maps(row)
    )
    caption = (
        "One test episode, shown to its end: frames of the query downwards, all frames to the right, the context left "
        "of the dashed line. The fuller the colour, the more attention weight that pattern gives (square root, each "
        "map on its own scale). A bright column is a frame that is kept in mind; the diagonal is the recent past; "
        "an empty map, that no query found a key by that pattern. "
        "What stands at a frame was understood from the one before it."
    )
    return [Plate("Which frames are attended to", caption, figures, "medium")] if figures else []


def _told(rows: Sequence[Row], metric: str) -> str:
    """The figure in words, for whoever cannot see it."""
    unit = "\u00a0%" if metric in AXES else ""
    return "; ".join(f"{row.name} {metric_text(metric, stat)}{unit}" for row in rows if (stat := row.metric(metric)))
