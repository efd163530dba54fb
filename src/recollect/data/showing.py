"""Pictures of one episode of a store: a strip of frames (PNG) or a film (GIF), with actions and rewards.

What is context and what is query is said above the frames, and by the colour of their border.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.data.store import EpisodeStore
from recollect.envs.tiles import render

Pictures = npt.NDArray[np.uint8]
SIDE = 80
"""Frames are enlarged to about this many pixels."""
LINE, GAP, BORDER = 12, 4, 2
COLUMNS = 10
COLOURS = {"context": (60, 110, 200), "query": (215, 120, 30)}
INK, PAPER = (20, 20, 20), (255, 255, 255)


def pictures(store: EpisodeStore, episode: int) -> Pictures:
    """The frames (T, h, w, 3) of an episode. Raises DataError where it has none, ConfigError for a wrong number."""
    if not 0 <= episode < store.n_episodes:
        raise ConfigError(f"{store.path} has episodes 0..{store.n_episodes - 1}, got {episode}")
    if "image" in store.keys:
        return store.column("image").episode(episode)
    if "tiles" in store.keys:
        return render(store.column("tiles").episode(episode))
    raise DataError(f"{store.path} has neither 'tiles' nor 'image': there is nothing to show")


def show(
    store: EpisodeStore, episode: int, out: str | os.PathLike[str], *, frames: int = 40, fps: float = 10.0
) -> Path:
    """Draw an episode into ``out``: a ``.gif`` of every frame, or a ``.png`` of ``frames`` of them at equal distances.

    Raises ConfigError for another ending or an episode that is not there, RecollectError without Pillow or where the
    file cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".png", ".gif"):
        raise ConfigError(f"'{out}' must end in .png or .gif")
    if frames < 1 or fps <= 0:
        raise ConfigError(f"frames and fps must be positive, got {frames} and {fps}")
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ImportError:
        raise RecollectError("drawing needs the extra 'report': pip install 'recollect[report]'") from None
    film = pictures(store, episode)
    told = _told(store, episode, len(film))
    film = film.repeat(zoom := max(1, round(SIDE / film.shape[1])), axis=1).repeat(zoom, axis=2)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            pillow.fromarray(_strip(film, told, frames)).save(out)
        else:
            cards = [pillow.fromarray(_card(film[t], *told[t])) for t in range(len(film))]
            cards[0].save(out, save_all=True, append_images=cards[1:], duration=round(1000 / fps), loop=0)
    except OSError as error:
        raise RecollectError(f"'{out}' cannot be written: {error.strerror or error}") from None
    return out


def _told(store: EpisodeStore, episode: int, length: int) -> list[tuple[str, str, str]]:
    """For every frame: its part, and two lines of text."""
    try:
        env = store.env_config
        names, context = env.actions, env.context_length
    except ConfigError:  # an environment of another version: its pictures are pictures still
        names, context = (), length
    stored = store.episode(episode)
    action = stored["action"].tolist()
    reward = stored["reward"].tolist() if "reward" in stored else [0.0] * length
    told: list[tuple[str, str, str]] = []
    for t in range(length):
        name = names[action[t]] if action[t] < len(names) else str(action[t])
        told.append(
            (
                "context" if t < context else "query",
                f"{t} {name if t else 'start'}",
                f"reward {reward[t]:g}" if t else "",
            )
        )
    return told


def _strip(film: Pictures, told: list[tuple[str, str, str]], frames: int) -> Pictures:
    """Rows of cards: those of the context, then those of the query."""
    chosen = np.unique(np.linspace(0, len(film) - 1, min(frames, len(film))).round().astype(np.int64)).tolist()
    rows: list[Pictures] = []
    for part in COLOURS:
        mine = [t for t in chosen if told[t][0] == part]
        for start in range(0, len(mine), COLUMNS):
            cards = [_card(film[t], *told[t]) for t in mine[start : start + COLUMNS]]
            blank = np.full_like(cards[0], 255)
            rows.append(np.concatenate([*cards, *[blank] * (min(COLUMNS, len(chosen)) - len(cards))], axis=1))
    return np.concatenate(rows)


def _card(frame: Pictures, part: str, first: str, second: str) -> Pictures:
    """One frame in the colour of its part, with its text below."""
    pillow: Any = importlib.import_module("PIL.Image")
    drawing: Any = importlib.import_module("PIL.ImageDraw")
    height, width = frame.shape[:2]
    edge = BORDER + GAP
    card = np.full((height + 2 * edge + 3 * LINE, width + 2 * edge, 3), 255, dtype=np.uint8)
    card[GAP : GAP + height + 2 * BORDER, GAP : GAP + width + 2 * BORDER] = COLOURS[part]
    card[edge : edge + height, edge : edge + width] = frame
    image = pillow.fromarray(card)
    pen = drawing.Draw(image)
    for line, (text, colour) in enumerate(((part, COLOURS[part]), (first, INK), (second, INK))):
        pen.text((GAP, height + 2 * edge + line * LINE - 2), text, fill=colour)
    return np.array(image)
