"""Draw ``docs/envs/grid-worlds.png``: one scripted episode of every grid world, from above and as seen.

    python bench/pictures/grid_worlds.py [OUTPUT.png]

Beside the name, the whole grid at the start and at the end; below, what the agent sees at some frames, with their
number and the action that led to them. Frames of the query are marked blue.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from recollect.envs import DistractingMemory, MultiDoorsKeys
from recollect.envs.grid_world import FORWARD, GridConfig, GridWorld
from recollect.envs.tiles import render

SCALE = 2
GAP, LINE = 8, 12
COLUMNS = 12
WIDTH = COLUMNS * (40 * SCALE + GAP) + GAP
INK, QUERY, PAPER = (30, 30, 30), (30, 80, 200), (255, 255, 255)


class Sheet(NamedTuple):
    """One episode to show: which, and which of its frames."""

    title: str
    config: GridConfig
    seed: int
    frames: Callable[[np.ndarray, GridConfig], list[int]]


class Episode(NamedTuple):
    """One scripted episode."""

    action: np.ndarray
    tiles: np.ndarray
    first: np.ndarray
    last: np.ndarray


def turning_points(_: np.ndarray, config: GridConfig) -> list[int]:
    """Ends of the walks of Distracting Memory, evenly filled up."""
    C, T = config.context_length, config.episode_length
    half = C // 4
    return sorted({0, half // 2, half, half + 2, C // 2, 3 * half, 3 * half + 1, C - 1, C, (C + T) // 2, T - 3, T - 1})


def deeds(action: np.ndarray, config: GridConfig) -> list[int]:
    """The frames before and after every pick-up and every try, after some of the context."""
    used = np.flatnonzero(action > FORWARD)
    context = np.linspace(0, config.context_length - 1, COLUMNS).astype(int)
    return [*context.tolist(), *sorted({t for u in used.tolist() for t in (u - 1, u)}), config.episode_length - 1]


SHEETS = (
    Sheet("Distracting Memory, width 40", DistractingMemory.Config(40), 3, turning_points),
    Sheet("Multi Doors Keys, 3 doors", MultiDoorsKeys.Config(3), 1, deeds),
    Sheet("Multi Doors Keys, 5 doors", MultiDoorsKeys.Config(5), 2, deeds),
)


def play(config: GridConfig, seed: int) -> Episode:
    """The scripted episode of a seed, by stepping."""
    env = config.build()
    assert isinstance(env, GridWorld)
    tiles = [env.reset(seed=seed)[0]]
    first, actions = env.grid(), env.scripted_actions()
    tiles += [env.step(action)[0] for action in actions.tolist()]
    return Episode(np.concatenate([[0], actions]), np.stack(tiles), first, env.grid())


def enlarged(codes: np.ndarray) -> Image.Image:
    """The picture of some tiles."""
    image = Image.fromarray(render(codes))
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)


def draw(sheet: Sheet) -> Image.Image:
    """One part of the picture."""
    config, episode = sheet.config, play(sheet.config, sheet.seed)
    frames = sheet.frames(episode.action, config)
    side, above = 40 * SCALE, [enlarged(episode.first), enlarged(episode.last)]
    stacked = 2 * above[0].width + 3 * GAP > WIDTH
    top = 2 * LINE + (1 + stacked) * (above[0].height + GAP)
    rows = -(-len(frames) // COLUMNS)
    page = Image.new("RGB", (WIDTH, top + rows * (side + LINE + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    lengths = f"context {config.context_length}, query {config.query_length} frames; the grid at the start and the end"
    pen.text((GAP, 2), f"{sheet.title}: {lengths}", INK)
    page.paste(above[0], (GAP, LINE + 4))
    page.paste(above[1], (GAP, LINE + 4 + above[0].height + GAP) if stacked else (above[0].width + 2 * GAP, LINE + 4))
    for k, t in enumerate(frames):
        x, y = GAP + k % COLUMNS * (side + GAP), top + k // COLUMNS * (side + LINE + GAP)
        in_query = t >= config.context_length
        name = config.actions[episode.action[t]] if t else ""
        page.paste(enlarged(episode.tiles[t]), (x, y))
        if in_query:
            pen.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=QUERY, width=2)
        pen.text((x, y + side + 1), f"{t} {name}", QUERY if in_query else INK)
    return page


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "docs" / "envs" / "grid-worlds.png"
    parser.add_argument("output", nargs="?", type=Path, default=default)
    output = parser.parse_args().output
    parts = [draw(sheet) for sheet in SHEETS]
    page = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER)
    at = 0
    for part in parts:
        page.paste(part, (0, at))
        at += part.height
    page.quantize(64).save(output, optimize=True)


if __name__ == "__main__":
    main()
