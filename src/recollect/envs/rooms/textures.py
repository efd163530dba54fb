"""The patterns of walls and floors, made here and no one's pictures, and the colours they are tinted with.

A pattern is one number per texel, 0 dark to 1 light; a tint turns it into colour. So every wall of every colour is one
small table that stays in the fastest cache. Each pattern is kept at 64, 32, ... 1 texels, every level the average of
the one before, and the renderer reads the level whose texels are about as large as a pixel: walking does not make far
textures flicker.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.envs.rooms.scene import FIRST_WALL, SIZE

TEXELS = 64
LEVELS = 7
WALL_COLOURS = ("blue", "cerise", "mint", "green", "purple", "coral", "red", "yellow")
NO_WALL = FIRST_WALL + len(WALL_COLOURS)

_WALL_RGB = [
    (38, 126, 214),
    (206, 70, 128),
    (172, 218, 160),
    (78, 142, 66),
    (88, 84, 204),
    (240, 138, 106),
    (178, 36, 30),
    (232, 196, 44),
]
_FLOOR_RGB = [(70, 108, 130), (128, 164, 184)]
_HORIZON_RGB, _ZENITH_RGB = (200, 222, 240), (70, 120, 180)


class Textures(NamedTuple):
    """Everything the renderer reads that is the same in every world, read-only float32."""

    patterns: npt.NDArray[np.float32]
    """(3, texels of all levels): the floor, and two of walls."""
    tints: npt.NDArray[np.float32]
    """(3 + walls, 2, 3): by code of a grid, the colour in 0..255 of pattern 0, and what pattern 1 adds to it. The last
    one is black, as no wall is: ``NO_WALL`` stands for what is not known."""
    sky: npt.NDArray[np.float32]
    """(SIZE, 3) colour in 0..255 of every row."""


@cache
def textures() -> Textures:
    """The textures, drawn once."""
    patterns = np.stack([_pyramid(_tiles()), _pyramid(_panels(2)), _pyramid(_panels(3))])
    light = np.array([*_FLOOR_RGB, *_WALL_RGB, (0, 0, 0)], dtype=np.float64)
    dark = light * np.where(np.arange(len(light)) < FIRST_WALL, 0.55, 0.22)[:, None]
    tints = np.stack([dark, light - dark], axis=1)
    height = np.linspace(1.0, 0.0, SIZE)[:, None] ** 1.5
    sky = np.array(_HORIZON_RGB) * (1 - height) + np.array(_ZENITH_RGB) * height
    made = Textures(patterns.astype(np.float32), tints.astype(np.float32), sky.astype(np.float32))
    for array in made:
        array.setflags(write=False)
    return made


def _pyramid(pattern: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """All levels of a pattern, the largest first, each flattened."""
    levels: list[npt.NDArray[np.float64]] = []
    while True:
        levels.append(pattern.ravel())
        n = len(pattern) // 2
        if n == 0:
            return np.concatenate(levels)
        pattern = pattern.reshape(n, 2, n, 2).mean(axis=(1, 3))


def _grid() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Positions (u, v) in 0..1 of the middle of every texel, v downwards."""
    centres = (np.arange(TEXELS, dtype=np.float64) + 0.5) / TEXELS
    return np.broadcast_to(centres, (TEXELS, TEXELS)), np.broadcast_to(centres[:, None], (TEXELS, TEXELS))


def _panels(columns: int) -> npt.NDArray[np.float64]:
    """A wall of framed panels, ``columns`` wide and two high, with a dark foot and a rail along the top."""
    u, v = _grid()
    x, y = u * columns, (v - 0.08) / 0.78 * 2
    column, row = np.floor(x).astype(int) % columns, np.clip(np.floor(y), 0, 1).astype(int)
    shade = 0.78 + 0.22 * ((column + row) % 2)
    from_edge_x = np.minimum(x - np.floor(x), np.ceil(x) - x) / columns
    from_edge_y = np.minimum(y - np.floor(y), np.ceil(y) - y) * 0.39
    from_edge = np.minimum(from_edge_x, from_edge_y)
    pattern = np.where(from_edge < 0.022, 0.30, np.where(from_edge < 0.05, shade - 0.16, shade))
    pattern = np.where(v > 0.86, np.where((u * 16) % 1 < 0.5, 0.12, 0.4), pattern)
    return np.where(v < 0.08, 0.6, pattern)


def _tiles() -> npt.NDArray[np.float64]:
    """A floor of honeycombs, some darker; it continues seamlessly into the next cell."""
    u, v = _grid()
    rows, columns = 4, 4
    centres = [((j + 0.5 * (i % 2)) / columns, (i + 0.5) / rows, i, j) for i in range(rows) for j in range(columns)]
    distances, shades = [], []
    for x, y, i, j in centres:
        dx, dy = np.abs(u - x), np.abs(v - y)
        distances.append(np.hypot(np.minimum(dx, 1 - dx), np.minimum(dy, 1 - dy)))
        shades.append((0.45, 0.8, 1.0, 0.9, 0.72, 0.95, 0.6)[(3 * i + 5 * j + i * j) % 7])
    nearest = np.sort(np.stack(distances), axis=0)
    shade = np.array(shades)[np.argmin(np.stack(distances), axis=0)]
    return np.where(nearest[1] - nearest[0] < 0.035, 0.25, shade)
