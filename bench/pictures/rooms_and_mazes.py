"""The contact sheets of the rooms and mazes: a plan with the walk, beside frames of it.

    python bench/pictures/rooms_and_mazes.py [FOLDER]

Context is drawn in white, the query in orange; the numbers on the plan are those of the frames.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from recollect.envs import find
from recollect.envs.rooms import Rooms
from recollect.envs.rooms.scene import BRIGHT_FLOOR, FIRST_WALL, RADIUS
from recollect.envs.rooms.textures import textures

SHOT, GAP, TITLE = 112, 6, 24
PLAN = 320
"""Least height of a plan."""
CONTEXT, QUERY = (255, 255, 255), (255, 150, 40)
PAPER, INK = (24, 26, 30), (225, 228, 232)


def plan(frames: dict[str, Any], context: int, labels: list[int]) -> Image.Image:
    """The world from above, and the walk of episode 0."""
    cells = frames["cells"][0, 0]
    rows = len(cells)
    scale = PLAN // rows if rows > 6 else 44
    scale = 44 if cells.shape[1] > 2 * rows else scale
    tints = textures().tints
    colours = tints[:, 0] + 0.85 * tints[:, 1]
    colours[:FIRST_WALL] = tints[:FIRST_WALL, 0] + 0.3 * tints[:FIRST_WALL, 1]
    assert BRIGHT_FLOOR < FIRST_WALL
    picture = Image.fromarray(colours[cells[::-1]].astype(np.uint8).repeat(scale, 0).repeat(scale, 1))
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x + 1) * scale, (rows - 1 - y) * scale

    for (x, y), rgb in zip(frames["targets_pos"][0, 0], frames["targets_color"][0, 0], strict=True):
        (left, top), (right, bottom) = place(x - RADIUS, y + RADIUS), place(x + RADIUS, y - RADIUS)
        draw.ellipse((left, top, right, bottom), fill=tuple((rgb * 255).astype(int)), outline=(0, 0, 0))
    walk = [place(x, y) for x, y in frames["agent_pos"][0]]
    draw.line(walk[: context - 1] if teleported(frames, context) else walk[:context], fill=CONTEXT, width=2)
    draw.line(walk[context - 1 :], fill=QUERY, width=2)
    for t in labels:
        x, y = walk[t]
        dx, dy = frames["agent_dir"][0, t]
        colour = CONTEXT if t < context else QUERY
        draw.line((x, y, x + 12 * dx, y - 12 * dy), fill=colour, width=3)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline=(0, 0, 0))
        draw.text((x + 6, y + 3), str(t), fill=colour, stroke_width=2, stroke_fill=(0, 0, 0))
    return picture


def teleported(frames: dict[str, Any], context: int) -> bool:
    """Whether the context's last step is longer than a step can be."""
    a, b = frames["agent_pos"][0, context - 2 : context]
    return bool(np.linalg.norm(a - b) > 0.5)


def strip(frames: dict[str, Any], context: int, labels: list[int], columns: int) -> Image.Image:
    """Frames of episode 0 with their numbers."""
    rows = -(-len(labels) // columns)
    sheet = Image.new("RGB", (columns * (SHOT + GAP), rows * (SHOT + TITLE)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, t in enumerate(labels):
        x, y = k % columns * (SHOT + GAP), k // columns * (SHOT + TITLE)
        shot = Image.fromarray(frames["image"][0, t]).resize((SHOT, SHOT), Image.Resampling.NEAREST)
        sheet.paste(shot, (x, y + 14))
        draw.text((x, y + 1), f"t={t}", fill=CONTEXT if t < context else QUERY)
    return sheet


def panel(name: str, seed: int, columns: int = 8) -> Image.Image:
    """One environment."""
    config = find(name)
    frames = config.generate(np.random.default_rng(seed), 1)
    context, total = config.context_length, config.episode_length
    if isinstance(config, Rooms.Config) and config.teleport:
        # The same moments before the end of the context and after the teleport, one above the other.
        same = (frames["image"][0, : context - 1] == frames["image"][0, context - 1]).all(axis=(1, 2, 3))
        after = [0, 1, 5, 10, 20, 40, 60, 90][: columns - 1]
        c = int(np.flatnonzero(same)[0])
        marked = [0, c, context - 2, context - 1, total - 1]
        labels = [c - 1, *(c + k for k in after), context - 2, *(context - 1 + k for k in after)]
    else:
        marked = [0, context - 1, total - 1]
        first = np.linspace(0, context - 1, columns).astype(int)
        labels = [*first.tolist(), *np.linspace(context, total - 1, columns).astype(int).tolist()]
    shots = strip(frames, context, labels, columns)
    above = plan(frames, context, marked)
    text = f"{name}    context {context} frames, query {config.query_length} (orange)"
    width = max(above.width + 2 * GAP + shots.width, 700)
    wide = above.width > 2 * above.height
    height = above.height + shots.height + GAP if wide else max(above.height, shots.height)
    sheet = Image.new("RGB", (shots.width + 2 * GAP if wide else width, height + TITLE + GAP), PAPER)
    ImageDraw.Draw(sheet).text((GAP, 4), text, fill=INK)
    sheet.paste(above, (GAP, TITLE))
    sheet.paste(shots, (GAP, TITLE + above.height + GAP) if wide else (above.width + 2 * GAP, TITLE))
    return sheet


def stack(panels: list[Image.Image], path: Path) -> None:
    """Panels below each other, written to ``path``."""
    sheet = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), PAPER)
    y = 0
    for each in panels:
        sheet.paste(each, (0, y))
        y += each.height
    sheet.save(path, optimize=True)


def main() -> None:
    """Write both sheets."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "envs"
    rooms = ["two-rooms", "four-rooms", "ten-rooms", "two-rooms-teleport", "four-rooms-teleport"]
    stack([panel(name, 3 + i) for i, name in enumerate(rooms)], folder / "rooms.png")
    stack([panel("maze-9x9", 1), panel("maze-15x15", 2)], folder / "mazes.png")


if __name__ == "__main__":
    main()
