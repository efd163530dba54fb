"""Filmstrips of what a world model imagined, above them what happened; and the one-picture summary for a README."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recollect.core.errors import RunError
from recollect.eval.report.data import FaceOff, Run
from recollect.eval.report.figures import PRINT, draw_accuracy_bars, draw_reward_bars, require_matplotlib, settings
from recollect.eval.report.published import published_for
from recollect.eval.report.rows import Panel, panels
from recollect.eval.report.text import task_name

Frames = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

MAX_FRAMES = 10
MAX_EPISODES = 3

NAME_ROOM = 0.125
"""Part of the summary's width that the names beside bars may take."""


@dataclass(frozen=True)
class Strip:
    """One labelled row of frames (T, H, W, 3) and the reward seen or predicted at its end (None: not given)."""

    name: str
    frames: Frames
    reward: float | None


@dataclass(frozen=True)
class Film:
    """One evaluation episode: the truth, then every backbone that imagined it; ``steps`` (T,) are time indices."""

    steps: list[int]
    strips: list[Strip]


@dataclass(frozen=True)
class _Arrays:
    truth: Frames
    imagined: Frames
    steps: npt.NDArray[np.int64]
    reward_true: Numbers | None
    reward_imagined: Numbers | None


def films(face: FaceOff) -> list[Film]:
    """Up to three evaluation episodes with what each backbone imagined, from its first finished seed.

    Backbones that were shown the same episode share one film; another truth makes another film. Raises RunError naming
    an ``arrays.npz`` that is damaged.
    """
    grouped: dict[tuple[int, bytes], Film] = {}
    for row in face.ranked("world"):
        arrays = _load(row.finished[0])
        if arrays is None:
            continue
        keep = np.unique(np.linspace(0, len(arrays.steps) - 1, min(MAX_FRAMES, len(arrays.steps))).round().astype(int))
        for episode in range(min(MAX_EPISODES, len(arrays.truth))):
            truth = arrays.truth[episode, keep]
            key = (episode, truth.tobytes() + arrays.steps.tobytes())
            if key not in grouped:
                seen = Strip("truth", truth, _at(arrays.reward_true, episode))
                grouped[key] = Film([int(step) for step in arrays.steps[keep]], [seen])
            imagined = arrays.imagined[episode, keep]
            grouped[key].strips.append(Strip(row.name, imagined, _at(arrays.reward_imagined, episode)))
    return [grouped[key] for key in sorted(grouped, key=lambda key: key[0])]


def strip_image(frames: Frames) -> Frames:
    """Frames (T, H, W, 3) side by side with transparent gaps, as RGBA (H, T W + gaps, 4)."""
    n_frames, height, width, _ = frames.shape
    gap = strip_gap(width)
    image = np.zeros((height, n_frames * (width + gap) - gap, 4), dtype=np.uint8)
    for i, frame in enumerate(frames):
        image[:, i * (width + gap) : i * (width + gap) + width] = np.concatenate(
            [frame, np.full((height, width, 1), 255, dtype=np.uint8)], axis=-1
        )
    return image


def strip_gap(width: int) -> int:
    """Pixels between frames that are ``width`` wide."""
    return max(1, width // 20)


def data_uri(image: Frames) -> str:
    """A PNG as a ``data:`` address, so that the page needs no other file."""
    require_matplotlib()
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def summary_png(face: FaceOff, question: str, headline: str) -> bytes:
    """One 1600 x 900 picture: question, answer, accuracy bars of both groups, one filmstrip of the best imagination."""
    matplotlib = require_matplotlib()
    strip = next(iter(films(face)), None)
    groups = [group for group in ("recall", "world") if face.ranked(group)]
    with matplotlib.rc_context(settings(PRINT, size=17.0)):
        figure = matplotlib.figure.Figure(figsize=(16, 9), dpi=100, facecolor=PRINT.paper)
        figure.text(0.025, 0.965, question, fontsize=19, va="center", color=PRINT.muted)
        heading = figure.text(0.025, 0.908, headline, fontsize=32, va="center", color=PRINT.ink)
        taken = heading.get_window_extent().width / (0.95 * figure.bbox.width)
        heading.set_fontsize(32 / max(1.0, taken))
        bottom = 0.40 if strip else 0.10
        axes = [(group, panel) for group in groups for panel in _summary_panels(face, group)]
        published = published_for(face.name)
        each, most = 0.99 / len(axes), max(len(panel.rows) for _, panel in axes) if len(axes) > len(groups) else 1
        for i, (group, panel) in enumerate(axes):
            left = 0.135 if len(axes) < 3 else 0.02 + NAME_ROOM
            width = 0.84 if len(axes) == 1 else each - NAME_ROOM - 0.03
            tall = (0.77 - bottom) * min(1.0, (1 + len(panel.rows)) / (1 + most))
            ax = figure.add_axes((left + each * i, 0.77 - tall, width, tall))
            ax.set_title(_summary_title(face, group, panel), loc="left", pad=32, fontsize=18)
            if group == "recall":
                paper = published.accuracy if published else None
                draw_accuracy_bars(ax, PRINT, face, panel, paper, all_guessers=len(axes) == 1)
            else:
                draw_reward_bars(ax, PRINT, face)
            for name in ax.get_yticklabels():  # a long name must not run off the page, or into the other bars
                room = (NAME_ROOM - 0.005) * figure.bbox.width
                name.set_fontsize(16.0 * min(1.0, room / name.get_window_extent().width))
        if published is not None:
            note = f"Diamonds: {published.source}" + ("" if face.name == published.same_task else ", on larger tables")
            figure.text(0.975, 0.855, note, fontsize=15, ha="right", color=PRINT.muted)
        if strip:
            _draw_film(figure, strip)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _summary_panels(face: FaceOff, group: str) -> list[Panel]:
    rows = face.ranked(group)
    return panels(face, rows) if group == "recall" else [Panel("", tuple(rows))]


def _summary_title(face: FaceOff, group: str, panel: Panel) -> str:
    if group == "world":
        return "Rewards: observing (pale), imagining (solid)"
    return panel.title or f"{task_name(face).capitalize()}: values right"


def _draw_film(figure: Any, film: Film) -> None:
    """Truth and the best backbone's imagination, large, with the time index under every frame."""
    shown = film.strips[:2]
    for i, strip in enumerate(shown):
        n_frames, height, width, _ = strip.frames.shape
        ax = figure.add_axes((0.135, 0.185 - 0.135 * i, 0.84, 0.125))
        image = strip_image(strip.frames)
        ax.imshow(image, interpolation="nearest", aspect="equal", extent=(0, image.shape[1], height, 0))
        ax.set_anchor("W")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        gap = strip_gap(width)
        ticks = [j * (width + gap) + width / 2 for j in range(n_frames)] if i == len(shown) - 1 else []
        ax.set_xticks(ticks, [str(step) for step in film.steps] if ticks else [])
        ax.set_yticks([height / 2], [strip.name])
        ax.tick_params(length=0)
        ax.tick_params(axis="y", labelcolor=PRINT.ink)


def _at(values: Numbers | None, episode: int) -> float | None:
    return None if values is None or episode >= len(values) else float(values[episode])


def _load(run: Run) -> _Arrays | None:
    """The strips of one run; None where it stored none."""
    path = run.folder / "arrays.npz"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files if name.startswith("strip_")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"'{path}' is damaged: {type(error).__name__}") from None
    if "strip_truth" not in found:
        return None
    return _checked(found, path)


def _checked(found: dict[str, npt.NDArray[Any]], path: Path) -> _Arrays:
    truth, imagined, steps = found["strip_truth"], found.get("strip_imagined"), found.get("strip_step")
    if imagined is None or steps is None:
        raise RunError(f"'{path}' is damaged: it holds strip_truth without strip_imagined and strip_step")
    good = truth.ndim == 5 and truth.shape[-1] == 3 and truth.dtype == np.uint8 and truth.size > 0
    if not good or imagined.shape != truth.shape or imagined.dtype != np.uint8 or steps.shape != truth.shape[1:2]:
        raise RunError(
            f"'{path}' is damaged: strips are not uint8 frames (n, T, H, W, 3) with one step index per frame"
        )
    rewards = [None if (r := found.get(f"strip_reward_{key}")) is None else r.ravel() for key in ("true", "imagined")]
    return _Arrays(truth, imagined, steps, *rewards)
