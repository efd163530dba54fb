"""The truth and every model's dream of it side by side, as one animated picture of bounded size."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.eval.report.data import FaceOff
from recollect.eval.report.figures import PRINT, require_matplotlib
from recollect.eval.report.strips import Frames, load_stored

SIDE = 88
"""Pixels that a dream is enlarged to, about."""

MARGIN, HEAD = 8, 20
"""Pixels around a dream, and above it for its name."""

NAMED = 84
"""Pixels that a name needs at least."""

MOST_BYTES = 1_500_000
"""Frames are left out until a picture is no larger."""

FRAME_MS, PAUSE_MS = 160, 900
"""How long a frame is shown, and the last one of an episode."""


@dataclass(frozen=True)
class Animation:
    """An encoded picture, its file name and what it shows."""

    name: str
    content: bytes
    alt: str
    width: int

    @property
    def uri(self) -> str:
        """As a ``data:`` address."""
        kind = self.name.rpartition(".")[2]
        return f"data:image/{kind};base64,{base64.b64encode(self.content).decode('ascii')}"


@dataclass(frozen=True)
class _Tile:
    name: str
    colour: str
    frames: Frames
    """(episodes, T, H, W, 3)"""


def animation(face: FaceOff, group: str) -> Animation | None:
    """The dreams of a group's backbones that were shown the same episodes as the best one, each by its first seed.

    None where no run stored a film. Raises RunError naming an ``arrays.npz`` that is damaged. Cost: seconds.
    """
    require_matplotlib()
    tiles: list[_Tile] = []
    steps: list[int] = []
    for row in face.ranked(group):
        stored = load_stored(row.finished[0], "film")
        if stored is None:
            continue
        if not tiles:
            tiles.append(_Tile("truth", PRINT.ink, stored.truth))
            steps = [int(step) for step in stored.steps]
        if np.array_equal(stored.truth, tiles[0].frames):
            tiles.append(_Tile(row.name, PRINT.row(face, row.name), stored.imagined))
    if not tiles:
        return None
    every, content, kind, width = 1, b"", "webp", 0
    while True:
        pictures, times = _pictures(tiles, steps, every)
        content, kind = _encoded(pictures, times)
        width = pictures[0].width
        if len(content) <= MOST_BYTES or len(pictures) <= 2 * len(tiles[0].frames):
            break
        every *= 2
    alt = f"Truth and the dreams of {', '.join(tile.name for tile in tiles[1:])}, frames {steps[0]} to {steps[-1]}"
    return Animation(f"dreams-{group}.{kind}", content, alt, width)


def _pictures(tiles: list[_Tile], steps: list[int], every: int) -> tuple[list[Any], list[int]]:
    """Pillow images of every ``every``-th frame of all episodes, and how long each is shown."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    n_episodes, n_frames, height, width, _ = tiles[0].frames.shape
    scale = max(1, round(SIDE / width))
    wide, tall = max(scale * width, NAMED) + MARGIN, scale * height + HEAD + MARGIN
    columns = min(len(tiles), max(3, math.ceil(math.sqrt(2 * len(tiles)))))
    size = (columns * wide + MARGIN, math.ceil(len(tiles) / columns) * tall + HEAD)
    pictures: list[Any] = []
    times: list[int] = []
    for episode in range(n_episodes):
        shown = sorted({*range(0, n_frames, every), n_frames - 1})
        for t in shown:
            picture = Image.new("RGB", size, PRINT.paper)
            pen = ImageDraw.Draw(picture)
            for i, tile in enumerate(tiles):
                left, top = MARGIN + i % columns * wide, i // columns * tall
                pen.rectangle((left, top + 6, left + 7, top + 13), fill=tile.colour)
                pen.text((left + 11, top + 3), _short(tile.name, wide - MARGIN - 11, pen, font), PRINT.ink, font)
                frame = Image.fromarray(tile.frames[episode, t])
                frame = frame.resize((scale * width, scale * height), Image.Resampling.NEAREST)
                picture.paste(frame, (left, top + HEAD))
            said = f"episode {episode + 1}, frame {steps[t]}"
            pen.text((MARGIN, size[1] - HEAD + 2), said, PRINT.muted, font)
            pictures.append(picture)
            times.append(PAUSE_MS if t == shown[-1] else FRAME_MS * min(every, 4))
    return pictures, times


def _short(name: str, room: int, pen: Any, font: Any) -> str:
    """The name, or as much of its beginning as there is room for."""
    while pen.textlength(name, font) > room and len(name) > 1:
        name = name[:-1].rstrip("…") + "…" if len(name) > 2 else name[:1]
    return name


def _encoded(pictures: list[Any], times: list[int]) -> tuple[bytes, str]:
    """An animated WebP, without loss where the pictures are flat; a GIF where Pillow was built without WebP."""
    from PIL import features

    buffer = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    if not features.check("webp"):
        pictures[0].save(buffer, format="GIF", **more)
        return buffer.getvalue(), "gif"
    flat = pictures[0].getcolors(1024) is not None
    pictures[0].save(buffer, format="WEBP", lossless=flat, quality=70, method=2, **more)
    return buffer.getvalue(), "webp"
