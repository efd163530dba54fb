"""What the page shows besides its tables: chapters of figures with captions, filmstrips, and how it was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from recollect.eval.report_data import Axis, FaceOff, Row
from recollect.eval.report_figures import (
    ROW_COLOURS,
    Palette,
    bar_height,
    draw_accuracy_bars,
    draw_curves,
    draw_horizon,
    draw_reward_bars,
    draw_state_scatter,
    draw_table_heat,
    svg,
)
from recollect.eval.report_strips import Film, data_uri, strip_gap, strip_image
from recollect.eval.report_text import describe_unfinished, human_seconds, percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Figure:
    """One picture: a title, its SVG, and the backbone's colour index where it shows only one."""

    title: str
    svg: Markup
    colour: int | None = None


@dataclass(frozen=True)
class Plate:
    """Figures that are read together, and one caption that says what is to be seen."""

    title: str
    caption: str
    figures: tuple[Figure, ...]
    small: bool = False


@dataclass(frozen=True)
class Chapter:
    """One group of the face-off; ``legend`` holds its backbones with their colour indices."""

    group: str
    title: str
    legend: tuple[tuple[str, int], ...]
    plates: tuple[Plate, ...]


@dataclass(frozen=True)
class Track:
    """One backbone's strip in a reel, as an image address."""

    name: str
    image: str
    reward: str
    alt: str


@dataclass(frozen=True)
class Reel:
    """One film ready for the page: tracks over a ruler of time indices; ``gap`` is in per cent of the width."""

    title: str
    steps: tuple[int, ...]
    gap: str
    tracks: tuple[Track, ...]


def chapters(face: FaceOff) -> list[Chapter]:
    """The figures of every group that has results."""
    makers = {"recall": ("Words", _recall_plates), "world": ("Worlds", _world_plates)}
    made: list[Chapter] = []
    for group in (group for group in face.groups if face.ranked(group)):
        title, plates = makers[group]
        legend = tuple((row.name, _colour(face, row)) for row in face.groups[group])
        made.append(Chapter(group, title, legend, tuple(plates(face))))
    return made


def reels(shown: Sequence[Film]) -> list[Reel]:
    """Films as images for the page."""
    made: list[Reel] = []
    for i, film in enumerate(shown, start=1):
        width, count = film.strips[0].frames.shape[2], len(film.steps)
        gap = 100 * strip_gap(width) / (count * (width + strip_gap(width)) - strip_gap(width))
        tracks = tuple(
            Track(
                strip.name,
                data_uri(strip_image(strip.frames)),
                _reward(strip.reward, predicted=j > 0),
                f"{strip.name}: {count} frames from step {film.steps[0]} to {film.steps[-1]}",
            )
            for j, strip in enumerate(film.strips)
        )
        made.append(Reel(f"Episode {i}", tuple(film.steps), f"{gap:.3f}", tracks))
    return made


def provenance(face: FaceOff) -> dict[str, Any]:
    """Where the numbers come from: per row recipe, commit, device, seeds, fingerprints; packages, commands, gaps."""
    rows = [row for group in face.groups.values() for row in group if row.finished]
    environments = [run.environment for row in rows for run in row.finished]
    packages: dict[str, list[str]] = {}
    for environment in environments:
        found = environment.get("packages")
        for name, version in (found if isinstance(found, dict) else {}).items():
            versions = packages.setdefault(str(name), [])
            if version is not None and str(version) not in versions:
                versions.append(str(version))
    return {
        "rows": [
            {
                "group": row.group,
                "row": row.name,
                "recipe": ", ".join(row.texts("recipe")),
                "commit": ", ".join(row.texts("commit")),
                "device": ", ".join(row.texts("device")),
                "seeds": ", ".join(str(run.seed) for run in row.finished),
                "fingerprint": ", ".join(row.texts("fingerprint")),
            }
            for row in rows
        ],
        "platform": "; ".join(dict.fromkeys(str(e["platform"]) for e in environments if "platform" in e)),
        "python": ", ".join(dict.fromkeys(str(e["python"]) for e in environments if "python" in e)),
        "packages": [f"{name} {', '.join(versions)}" for name, versions in sorted(packages.items()) if versions],
        "commands": list(dict.fromkeys(_command(e["command"]) for e in environments if "command" in e)),
        "unfinished": [
            f"{run.group} / {run.row} / {describe_unfinished(run.status, run.seed, run.last_step)}"
            for run in face.runs
            if run.status != "finished"
        ],
        "total_time": human_seconds(sum(float(run.results.get("wall_s") or 0) for row in rows for run in row.finished)),
    }


def _reward(value: float | None, *, predicted: bool) -> str:
    if value is None:
        return ""
    return f"predicts {value:.2f}" if predicted else f"reward {value:g}"


def _command(command: Any) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def _recall_plates(face: FaceOff) -> list[Plate]:
    rows, line = face.ranked("recall"), face.line("recall")
    height = max(250.0, bar_height(len(rows)))
    dashed = (
        f" Dashed: a guesser that knows the keys but not the contexts, {percent(line)}." if line is not None else ""
    )
    plates = [
        Plate(
            "How much is recalled, and at what price",
            f"Bars: values recalled right, best first.{_whiskers(rows)}{dashed} Points: the same accuracy against the "
            "bytes a backbone carries from one position to the next; up and to the left is better.",
            (
                _figure("Accuracy", partial(draw_accuracy_bars, face=face), _scores(rows), height),
                _figure(
                    "Accuracy against state",
                    partial(draw_state_scatter, face=face),
                    "Accuracy against bytes of state, one labelled point per backbone",
                    height,
                ),
            ),
        )
    ]
    celled = [row for row in rows if row.detail("cells")]
    if celled:
        maps = tuple(
            _figure(
                row.name,
                partial(draw_table_heat, row=row),
                f"Accuracy of {row.name} by table size",
                height=230,
                width=230,
                colour=_colour(face, row),
            )
            for row in celled
        )
        plates.append(
            Plate(
                "Where it breaks: accuracy by table size",
                "Each square is a table of so many contexts (upwards) by so many keys (to the right); the fuller the "
                "colour, the more of it is recalled. All maps share one scale, from 0 (empty) to 100 % (full).",
                maps,
                small=True,
            )
        )
    return [*plates, *_curve_plates(face, "recall", "accuracy")]


def _world_plates(face: FaceOff) -> list[Plate]:
    rows, chance = face.ranked("world"), face.line("world")
    dashed = f" Dashed: chance, {percent(chance)}." if chance is not None else ""
    height = max(250.0, bar_height(2 * len(rows)))
    figures = [_figure("Reward", partial(draw_reward_bars, face=face), _scores(rows), height)]
    caption = (
        "Rewards predicted right: pale while the frames are shown, solid while they are imagined. A backbone that "
        f"remembers keeps its solid bar as long as its pale one.{_whiskers(rows)}{dashed}"
    )
    if any(row.detail("generation_mse_curve") for row in rows):
        alt = "Squared error of imagined frames against the number of frames imagined"
        figures.append(_figure("Error over the imagined horizon", partial(draw_horizon, face=face), alt, height))
        caption += " The error curves: squared error per frame as imagination goes on; a flat curve forgets nothing."
    logged = {name for row in rows for run in row.runs for entry in run.log for name in entry.get("eval") or {}}
    name = next((n for n in ("imagination_accuracy", "inference_accuracy") if n in logged), "imagination_accuracy")
    return [
        Plate("What is still known when the eyes are shut", caption, tuple(figures)),
        *_curve_plates(face, "world", name),
    ]


def _curve_plates(face: FaceOff, group: str, name: str) -> list[Plate]:
    """Loss and evaluation curves against steps and against seconds, as far as anything was logged."""
    rows = face.groups[group]
    wanted: list[tuple[str, str, bool, Axis]] = [
        ("Loss by steps", "loss", False, "step"),
        ("Loss by time", "loss", False, "seconds"),
        ("Accuracy by steps", name, True, "step"),
        ("Accuracy by time", name, True, "seconds"),
    ]
    figures: list[Figure] = []
    for title, metric, evaluation, axis in wanted:
        if any(run.curve(metric, axis, evaluation=evaluation)[0].size for row in rows for run in row.runs):
            draw = partial(draw_curves, face=face, rows=rows, name=metric, axis=axis, evaluation=evaluation)
            figures.append(_figure(title, draw, f"{title}, {group}: one line per backbone", height=220))
    if not figures:
        return []
    what = {"accuracy": "accuracy", "imagination_accuracy": "reward accuracy in imagination"}.get(
        name, "reward accuracy"
    )
    caption = (
        f"Training loss (averaged over neighbouring steps) and {what} on held-out data, against training steps and "
        "against seconds of training. Bold: mean over seeds; thin: single seeds; dotted: a run that has not "
        "finished; dashed: the same line as above."
    )
    return [Plate("How it was learned", caption, tuple(figures))]


def _figure(
    title: str,
    draw: Callable[[Axes, Palette], None],
    alt: str,
    height: float = 250.0,
    *,
    width: float = 400.0,
    colour: int | None = None,
) -> Figure:
    from markupsafe import Markup

    return Figure(title, Markup(svg(draw, alt, height=height, width=width)), colour)


def _colour(face: FaceOff, row: Row) -> int:
    return face.row_names.index(row.name) % len(ROW_COLOURS)


def _scores(rows: Sequence[Row]) -> str:
    """The bars in words, for whoever cannot see them."""
    return "; ".join(f"{row.name} {percent(score.mean)}" for row in rows if (score := row.score))


def _whiskers(rows: Sequence[Row]) -> str:
    return " Whiskers: one standard deviation over seeds." if any(len(row.finished) > 1 for row in rows) else ""
