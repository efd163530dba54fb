"""Filmstrips of what a world model imagined, above them what happened, as ``eval.imagination.Gallery`` stored them."""

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
from recollect.eval.report.figures import require_matplotlib

Frames = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

MAX_FRAMES = 10
MAX_EPISODES = 3

SMALL_PNG = 12_000
"""Bytes up to which a strip is embedded as it is; a larger one that WebP makes smaller loses details nobody sees."""


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
class Stored:
    """Some episodes of one run: frames (n, T, H, W, 3) at time indices ``steps`` (T,), and per episode the rewards, the
    number among the test episodes and the error of a dreamed frame, as far as they were stored.
    """

    truth: Frames
    imagined: Frames
    steps: npt.NDArray[np.int64]
    reward_true: Numbers | None = None
    reward_imagined: Numbers | None = None
    number: Numbers | None = None
    error: Numbers | None = None


def films(face: FaceOff, group: str) -> list[Film]:
    """Up to three evaluation episodes with what each backbone of a group imagined, from its first finished seed.

    Backbones that were shown the same episode share one film; another truth makes another film. Raises RunError naming
    an ``arrays.npz`` that is damaged.
    """
    grouped: dict[tuple[int, bytes], Film] = {}
    for row in face.ranked(group):
        arrays = load_stored(row.finished[0])
        if arrays is None:
            continue
        keep = np.unique(np.linspace(0, len(arrays.steps) - 1, min(MAX_FRAMES, len(arrays.steps))).round().astype(int))
        for episode in range(min(MAX_EPISODES, len(arrays.truth))):
            truth = arrays.truth[episode, keep]
            key = (episode, truth.tobytes() + arrays.steps.tobytes())
            if key not in grouped:
                seen = Strip("truth", truth, at(arrays.reward_true, episode))
                grouped[key] = Film([int(step) for step in arrays.steps[keep]], [seen])
            imagined = arrays.imagined[episode, keep]
            grouped[key].strips.append(Strip(row.name, imagined, at(arrays.reward_imagined, episode)))
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


def small_uri(image: Frames) -> str:
    """As ``data_uri``, or, for a picture that stays large as a PNG, as a WebP that looks the same."""
    exact = data_uri(image)
    from PIL import Image, features

    if len(exact) * 3 // 4 <= SMALL_PNG or not features.check("webp"):
        return exact
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", quality=80, method=4)
    lossy = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return min(exact, lossy, key=len)


def at(values: Numbers | None, episode: int) -> float | None:
    """The value of one episode, where there is one."""
    return None if values is None or episode >= len(values) else float(values[episode])


def load_stored(run: Run, kind: str = "strip") -> Stored | None:
    """The episodes of one kind ("strip", "best", "worst", "film") of a run; None where it stored none.

    Raises RunError naming an ``arrays.npz`` that is damaged.
    """
    path = run.folder / "arrays.npz"
    if not path.is_file():
        return None
    wanted = (f"{kind}_", "strip_step")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files if name.startswith(wanted)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"'{path}' is damaged: {type(error).__name__}") from None
    return _checked(found, kind, path) if f"{kind}_truth" in found else None


def _checked(found: dict[str, npt.NDArray[Any]], kind: str, path: Path) -> Stored:
    truth, imagined = found[f"{kind}_truth"], found.get(f"{kind}_imagined")
    steps = found.get(f"{kind}_step", found.get("strip_step"))
    if imagined is None or steps is None:
        raise RunError(f"'{path}' is damaged: it holds {kind}_truth without {kind}_imagined and {kind}_step")
    good = truth.ndim == 5 and truth.shape[-1] == 3 and truth.dtype == np.uint8 and truth.size > 0
    if not good or imagined.shape != truth.shape or imagined.dtype != np.uint8 or steps.shape != truth.shape[1:2]:
        raise RunError(
            f"'{path}' is damaged: strips are not uint8 frames (n, T, H, W, 3) with one step index per frame"
        )
    keys = ("reward_true", "reward_imagined", "number", "error")
    facts = [None if (r := found.get(f"{kind}_{key}")) is None else r.ravel() for key in keys]
    return Stored(truth, imagined, steps, *facts)
