"""Tile codes of the grid worlds, and their pictures.

A grid world is stored as small integers, one per visible tile, and drawn when it is read. What a code means:

==========================  =======================================================================
code                        tile
==========================  =======================================================================
0                           empty floor
1                           wall
2 .. 1 + C                  floor of colour 0 .. C - 1, for the C = 4 colours of ``COLOURS``
2 + C + 4 g + d             the agent heading d, on empty floor (g = 0) or on floor of colour g - 1
==========================  =======================================================================

A tile is 8 x 8 pixels. The atlas is drawn once, at eight times that size, and averaged down.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]

COLOURS = ("green", "blue", "purple", "yellow")
HEADINGS = ("right", "down", "left", "up")
"""Clockwise, with y growing downwards: turning right adds one."""

EMPTY, WALL, FIRST_COLOUR = 0, 1, 2
FIRST_AGENT = FIRST_COLOUR + len(COLOURS)
N_CODES = FIRST_AGENT + 4 * (1 + len(COLOURS))
TILE_PIXELS = 8

_SUPERSAMPLING = 8
_RGB = {
    "floor": (0, 0, 0),
    "line": (100, 100, 100),
    "wall": (110, 110, 110),
    "agent": (255, 0, 0),
    "green": (30, 190, 60),
    "blue": (40, 80, 240),
    "purple": (140, 50, 200),
    "yellow": (240, 215, 30),
}


def agent_code(floor: Bytes, heading: Bytes | int) -> Bytes:
    """Code of an agent heading 0..3 that stands on the floor with the given code (empty or coloured, not a wall)."""
    ground = np.maximum(floor, WALL) - WALL  # empty 0, colour c: c + 1
    return (FIRST_AGENT + 4 * ground + heading).astype(np.uint8)


@cache
def atlas() -> Bytes:
    """Pictures of all codes (N_CODES, 8, 8, 3), read-only."""
    floors = [_floor("floor"), *(_floor(name) for name in COLOURS)]
    with_agent = [_with_agent(floor, heading) for floor in floors for heading in range(4)]
    wall = np.full_like(floors[0], _RGB["wall"])
    large = np.stack([floors[0], wall, *floors[1:], *with_agent])
    n, s = TILE_PIXELS, _SUPERSAMPLING
    pictures = large.reshape(N_CODES, n, s, n, s, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    pictures.setflags(write=False)
    return pictures


def render(codes: Bytes) -> Bytes:
    """Pictures (..., 8 h, 8 w, 3) of codes (..., h, w). Cost: one copy of 24 bytes per row of every tile."""
    n = TILE_PIXELS
    # One element per pixel row of a tile, so that a lookup writes the picture in its final order.
    rows = atlas().reshape(N_CODES * n, n * 3).view(f"V{n * 3}")[:, 0]
    index = codes[..., :, None, :].astype(np.intp) * n + np.arange(n, dtype=np.intp)[:, None]
    *lead, h, w = codes.shape
    return rows[index].view(np.uint8).reshape(*lead, h * n, w * n, 3)


def codes_from_pixels(pixels: npt.NDArray[np.uint8 | np.floating]) -> Bytes:
    """Codes (..., h, w) of the pictures nearest to pixels (..., 8 h, 8 w, 3) in 0..255, by squared distance per tile.

    The exact inverse of ``render``; on imagined pictures it says which tile the model has painted.
    """
    *lead, height, width, _ = pixels.shape
    n = TILE_PIXELS
    tiles = pixels.reshape(*lead, height // n, n, width // n, n, 3).swapaxes(-4, -3)
    tiles = tiles.reshape(*tiles.shape[:-3], -1).astype(np.float32)
    pictures = atlas().reshape(N_CODES, -1).astype(np.float32)
    distance = (pictures**2).sum(axis=1) - 2 * tiles @ pictures.T
    return distance.argmin(axis=-1).astype(np.uint8)


def _coordinates() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Positions x and y in 0..1 of the sample points of one tile."""
    size = TILE_PIXELS * _SUPERSAMPLING
    centres = (np.arange(size, dtype=np.float64) + 0.5) / size
    return np.broadcast_to(centres, (size, size)), np.broadcast_to(centres[:, None], (size, size))


def _floor(name: str) -> npt.NDArray[np.float64]:
    """Floor of one colour, with a quarter pixel of grid line along the top and the left."""
    x, y = _coordinates()
    picture = np.empty((*x.shape, 3))
    picture[:] = _RGB[name]
    picture[np.minimum(x, y) < 1 / 32] = _RGB["line"]
    return picture


def _with_agent(floor: npt.NDArray[np.float64], heading: int) -> npt.NDArray[np.float64]:
    """A triangle with its tip at the heading, over the floor."""
    x, y = _coordinates()
    along, across = [(x, y), (y, x), (1 - x, y), (1 - y, x)][heading]
    inside: Mask = (along > 0.14) & (np.abs(across - 0.5) < 0.34 * (0.88 - along) / 0.74)
    return np.where(inside[..., None], np.array(_RGB["agent"], dtype=np.float64), floor)
