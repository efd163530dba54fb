"""What the page shows besides its tables: chapters of figures with captions, filmstrips, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recollect.eval.report.animation import Animation
from recollect.eval.report.browse import Browser, browsers
from recollect.eval.report.data import FaceOff
from recollect.eval.report.language_plates import language_plates
from recollect.eval.report.metrics import REWARDS
from recollect.eval.report.plates import Plate
from recollect.eval.report.rows import legend
from recollect.eval.report.strips import Film, data_uri, films, strip_gap, strip_image
from recollect.eval.report.text import chapter_title, describe_unfinished, human_seconds
from recollect.eval.report.words import recall_plates
from recollect.eval.report.worlds import world_plates


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


@dataclass(frozen=True)
class Chapter:
    """One group of the face-off; ``legend`` holds labels with a colour's index, or None."""

    group: str
    title: str
    legend: tuple[tuple[str, int | None], ...]
    plates: tuple[Plate, ...]
    reels: tuple[Reel, ...] = ()
    animation: Animation | None = None
    browsers: tuple[Browser, ...] = ()
    rewarded: bool = True
    """Whether a reward is what its episodes end with."""


def chapters(face: FaceOff, moving: Mapping[str, Animation]) -> list[Chapter]:
    """The figures of every group that has results; ``moving`` are the groups' animations."""
    made: list[Chapter] = []
    for group in (group for group in face.groups if face.ranked(group)):
        title, colours = chapter_title(face, group), tuple(legend(face, group))
        if face.family(group) == "recall":
            made.append(Chapter(group, title, colours, tuple(recall_plates(face, group))))
        elif face.family(group) == "language":
            made.append(Chapter(group, title, colours, tuple(language_plates(face, group))))
        else:
            told = any(run.results["metrics"].get(REWARDS[0]) is not None for run in face.ranked(group)[0].finished)
            shown = tuple(reels(films(face, group), rewarded=told))
            plates, steps = tuple(world_plates(face, group)), tuple(browsers(face, group))
            made.append(Chapter(group, title, colours, plates, shown, moving.get(group), steps, told))
    return made


def reels(shown: Sequence[Film], *, rewarded: bool = True) -> list[Reel]:
    """Films as images for the page, with the rewards beside them where there are any to predict."""
    made: list[Reel] = []
    for i, film in enumerate(shown, start=1):
        width, count = film.strips[0].frames.shape[2], len(film.steps)
        gap = 100 * strip_gap(width) / (count * (width + strip_gap(width)) - strip_gap(width))
        tracks = tuple(
            Track(
                strip.name,
                data_uri(strip_image(strip.frames)),
                _reward(strip.reward, predicted=j > 0) if rewarded else "",
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
