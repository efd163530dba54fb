"""Figures as the page holds them: titles, captions, and the learning curves that both groups share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from recollect.eval.report.data import Axis, FaceOff, Row
from recollect.eval.report.figures import Palette, draw_curves, svg
from recollect.eval.report.metrics import is_share, label
from recollect.eval.report.rows import panels
from recollect.eval.report.text import percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

WIDE = 820.0
"""Width of a figure that takes a line of the page to itself."""


@dataclass(frozen=True)
class Figure:
    """One picture: a title, its SVG, and the backbone's colour index where it shows only one."""

    title: str
    svg: Markup
    colour: int | None = None
    wide: bool = False


@dataclass(frozen=True)
class Plate:
    """Figures that are read together, and one caption that says what is to be seen."""

    title: str
    caption: str
    figures: tuple[Figure, ...]
    form: Literal["", "small", "medium"] = ""


def curve_plates(face: FaceOff, group: str, name: str) -> list[Plate]:
    """Loss and evaluation curves against steps and, where all rows share one set of axes, against seconds too."""
    rows = face.groups[group]
    shown = panels(face, rows)
    score, loss = "Accuracy" if is_share(name) else "Error", "Loss"
    if face.family(group) == "language":
        score, loss = "Held-out loss", "Training loss"
    wanted: list[tuple[str, str, bool, Axis]] = [
        (f"{loss} by steps", "loss", False, "step"),
        (f"{loss} by time", "loss", False, "seconds"),
        (f"{score} by steps", name, True, "step"),
        (f"{score} by time", name, True, "seconds"),
    ]
    if len(shown) > 1:
        wanted = [wanted[2], wanted[3], wanted[0]]
    figures: list[Figure] = []
    for title, metric, evaluation, axis in wanted:
        for panel in shown:
            logged = (run.curve(metric, axis, evaluation=evaluation)[0] for row in panel.rows for run in row.runs)
            if any(curve.size for curve in logged):
                draw = partial(draw_curves, face=face, panel=panel, name=metric, axis=axis, evaluation=evaluation)
                alt = f"{title}, {panel.title or group}: one line per backbone"
                height = max(220.0, 75.0 + 13.0 * len(panel.rows)) if evaluation else 220.0
                figures.append(figure(titled(title, panel.title), draw, alt, height=height))
    if not figures:
        return []
    told = {
        "accuracy": "accuracy",
        "imagination_accuracy": "reward accuracy in imagination",
        "inference_accuracy": "reward accuracy",
        "generation_mse": "the error of imagined frames",
    }
    what = told.get(name) or label(name)
    caption = (
        f"Training loss (averaged over neighbouring steps) and {what} on held-out data, against training steps and "
        "against seconds of training. Bold: mean over seeds; thin: single seeds; dotted: a run that has not "
        f"finished{'; dashed grey: the same line as above' if face.line(group) is not None else ''}."
    )
    return [Plate("How it was learned", caption, tuple(figures))]


def titled(title: str, panel: str) -> str:
    """A figure's title, with its panel's where there are several."""
    return f"{title}: {panel}" if panel else title


def figure(
    title: str,
    draw: Callable[[Axes, Palette], None],
    alt: str,
    height: float = 250.0,
    *,
    width: float = 400.0,
    colour: int | None = None,
) -> Figure:
    """A figure drawn by ``draw``; one of ``WIDE`` or more is given a line to itself."""
    from markupsafe import Markup

    return Figure(title, Markup(svg(draw, alt, height=height, width=width)), colour, wide=width >= WIDE)


def scores(rows: Sequence[Row]) -> str:
    """The bars in words, for whoever cannot see them."""
    return "; ".join(f"{row.name} {percent(score.mean)}" for row in rows if (score := row.score))


def whiskers(rows: Sequence[Row]) -> str:
    """What the whiskers of bars are, where there are any."""
    return " Whiskers: one standard deviation over seeds." if any(len(row.finished) > 1 for row in rows) else ""
