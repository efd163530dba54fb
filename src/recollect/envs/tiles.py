"""Tile codes of the grid worlds, and their pictures.

A grid world is stored as small integers, one per visible tile, and drawn when it is read. What a code means, for the
C = 4 colours of ``COLOURS``:

==========================  =======================================================================
code                        tile
==========================  =======================================================================
0                           empty floor
1                           wall
2 .. 5                      floor of colour 0 .. 3
6 + 4 g + d                 the agent heading d, on empty floor (g = 0) or on floor of colour g - 1
26 .. 29                    locked door of colour 0 .. 3
30 .. 33                    open door of colour 0 .. 3
34 .. 37                    key of colour 0 .. 3
38 + 4 c + d                the agent heading d, in an open door of colour c
==========================  =======================================================================

The first ``N_FLOOR_CODES`` = 26 are all that a world without doors shows.

A tile is 8 x 8 pixels and looks as MiniGrid draws it at that size: ``atlas.npy`` beside this file holds the pictures
of all codes, made once by MiniGrid's own renderer (``bench/pictures/make_atlas.py``), which is not needed to read them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

COLOURS = ("green", "blue", "purple", "yellow")
HEADINGS = ("right", "down", "left", "up")
"""Clockwise, with y growing downwards: turning right adds one."""

EMPTY, WALL, FIRST_COLOUR = 0, 1, 2
FIRST_AGENT = FIRST_COLOUR + len(COLOURS)
N_FLOOR_CODES = FIRST_AGENT + 4 * (1 + len(COLOURS))
FIRST_LOCKED = N_FLOOR_CODES
FIRST_OPEN = FIRST_LOCKED + len(COLOURS)
FIRST_KEY = FIRST_OPEN + len(COLOURS)
FIRST_AGENT_IN_DOOR = FIRST_KEY + len(COLOURS)
N_CODES = FIRST_AGENT_IN_DOOR + 4 * len(COLOURS)
TILE_PIXELS = 8


def agent_code(floor: Bytes, heading: npt.NDArray[np.integer] | int) -> Bytes:
    """Code of an agent heading 0..3 that stands on the tile of the given code: empty or coloured floor, or an open
    door. Nobody stands on anything else.
    """
    return (_first_agent()[floor] + heading).astype(np.uint8)


@cache
def atlas() -> Bytes:
    """Pictures of all codes (N_CODES, 8, 8, 3), read-only."""
    pictures: Bytes = np.load(Path(__file__).with_name("atlas.npy"), allow_pickle=False)
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


def text(codes: Bytes, *, colour: bool = True) -> str:
    """Codes (h, w) for a terminal, two characters a tile: what it is, then the first letter of its colour.

    ``##`` wall, ``:g`` floor, ``Dg`` locked door, ``|g`` open door, ``kg`` key, and ``> v < ^`` the agent over the
    letter of what it stands on. With ``colour``, coloured tiles are also printed in their colour.
    """
    glyphs = _glyphs(colour)
    return "\n".join("".join(glyphs[code] for code in row) for row in codes.tolist())


@cache
def _first_agent() -> npt.NDArray[np.int64]:
    """Code of the agent heading right, by the code of the tile below it."""
    first = np.full(N_CODES, N_CODES, dtype=np.int64)
    c = np.arange(len(COLOURS))
    first[EMPTY] = FIRST_AGENT
    first[FIRST_COLOUR + c] = FIRST_AGENT + 4 * (1 + c)
    first[FIRST_OPEN + c] = FIRST_AGENT_IN_DOOR + 4 * c
    return first


@cache
def _glyphs(colour: bool) -> tuple[str, ...]:
    escapes = {"green": "\033[42;30m", "blue": "\033[44;37m", "purple": "\033[45;37m", "yellow": "\033[43;30m"}

    def paint(glyphs: str, name: str) -> str:
        return f"{escapes[name]}{glyphs}\033[0m" if colour else glyphs

    def each(glyph: str) -> list[str]:
        return [paint(glyph + name[0], name) for name in COLOURS]

    def agents(names: tuple[str, ...]) -> list[str]:
        return [paint(glyph + name[0], name) for name in names for glyph in ">v<^"]

    on_empty = [f"{glyph} " for glyph in ">v<^"]
    doors = [*each("D"), *each("|"), *each("k")]
    return ("  ", "##", *each(":"), *on_empty, *agents(COLOURS), *doors, *agents(COLOURS))
