"""What the page shows besides its tables: chapters of figures with captions, filmstrips, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recollect.eval.report.data import FaceOff
from recollect.eval.report.figures import bar_height, draw_horizon, draw_reward_bars
from recollect.eval.report.plates import Plate, curve_plates, figure, scores, whiskers
from recollect.eval.report.rows import legend
from recollect.eval.report.strips import Film, data_uri, strip_gap, strip_image
from recollect.eval.report.text import describe_unfinished, human_seconds, percent
from recollect.eval.report.words import recall_plates


@dataclass(frozen=True)
class Chapter:
    """One group of the face-off; ``legend`` holds labels with a colour's index, or None."""

    group: str
    title: str
    legend: tuple[tuple[str, int | None], ...]
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
    makers = {"recall": ("Words", recall_plates), "world": ("Worlds", _world_plates)}
    made: list[Chapter] = []
    for group in (group for group in face.groups if face.ranked(group)):
        title, plates = makers[group]
        made.append(Chapter(group, title, tuple(legend(face, group)), tuple(plates(face))))
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


def _world_plates(face: FaceOff) -> list[Plate]:
    rows, chance = face.ranked("world"), face.line("world")
    dashed = f" Dashed: chance, {percent(chance)}." if chance is not None else ""
    height = max(250.0, bar_height(2 * len(rows)))
    figures = [figure("Reward", partial(draw_reward_bars, face=face), scores(rows), height)]
    caption = (
        "Rewards predicted right: pale while the frames are shown, solid while they are imagined. A backbone that "
        f"remembers keeps its solid bar as long as its pale one.{whiskers(rows)}{dashed}"
    )
    if any(row.detail("generation_mse_curve") for row in rows):
        alt = "Squared error of imagined frames against the number of frames imagined"
        figures.append(figure("Error over the imagined horizon", partial(draw_horizon, face=face), alt, height))
        caption += " The error curves: squared error per frame as imagination goes on; a flat curve forgets nothing."
    logged = {name for row in rows for run in row.runs for entry in run.log for name in entry.get("eval") or {}}
    name = next((n for n in ("imagination_accuracy", "inference_accuracy") if n in logged), "imagination_accuracy")
    return [
        Plate("What is still known when the eyes are shut", caption, tuple(figures)),
        *curve_plates(face, "world", name),
    ]
