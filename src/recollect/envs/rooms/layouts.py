"""The fixed plans of Two, Four and Ten Rooms, the ways between their rooms, and what is drawn per episode.

A plan is Memory Maze's kind of text: ``*`` wall, ``G`` a cell that may hold a dome, ``P`` a cell where an episode may
start. Rooms are 3 x 3 cells and form a ring; between two neighbours lies one cell of doorway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.envs.rooms.scene import DOME_COLOURS, FIRST_WALL, FLOOR, Bytes, Floats, Scene
from recollect.envs.rooms.textures import WALL_COLOURS

RoomsName: TypeAlias = Literal["two", "four", "ten"]
ROOM = 3
"""Cells along a room."""

_TEXT = {
    "two": """
*********
*PGG*GGP*
*PPG*GPP*
*PP   PP*
*********
""",
    "four": """
*********
*PP   PP*
*PPG*GPP*
* GG*GG *
* ***** *
* GG*GG *
*PPG*GPP*
*PP   PP*
*********
""",
    "ten": """
*********************
*PP   PP*PP   PP*GGP*
*PPG*GPG*GPG*GPG*GPP*
* GG*PP   PP*PP   P *
* ***************** *
* GG*PP   PP*PP   P *
*PPG*GPG*GPG*GPG*GPP*
*PP   PP*PP   PP*GGP*
*********************
""",
}
_DOMES = {"two": 3, "four": 6, "ten": 15}


@dataclass(frozen=True, eq=False)
class Layout:
    """A plan, read. Positions are cells (x, y) inside the outer walls, y upwards; arrays are read-only."""

    free: Bytes
    """(H, W) 1 where one can walk, outer walls included, lowest y first."""
    blocks: Bytes
    """(H, W) the block 0..9 a wall belongs to: walls of a block share a colour."""
    dome_cells: npt.NDArray[np.int64]
    """(G, 2)"""
    start_cells: npt.NDArray[np.int64]
    """(P, 2)"""
    n_domes: int
    rooms: npt.NDArray[np.int64]
    """(R, 2) the lowest left cell of every room, clockwise around the ring from the lower left one."""
    ways: Floats
    """(R, 2, 9) how to leave room r for the next one clockwise (0) or counterclockwise (1): first towards (x, y) until
    within half a cell of ``edge`` along ``lateral`` (0 x, 1 y), then towards (x, y) until past ``goal`` along the other
    axis, in the direction ``sign``: x, y, lateral, edge, x, y, goal, sign, next room."""


@cache
def layout(name: RoomsName) -> Layout:
    """The plan of that name."""
    text = np.array([list(line) for line in _TEXT[name].strip().split("\n")])
    height, width = text.shape
    plan = text[::-1]
    cells = plan[1:-1, 1:-1]
    rooms = _ring(height, width)
    made = Layout(
        free=(plan != "*").astype(np.uint8),
        blocks=wall_blocks(height, width)[::-1],
        dome_cells=_cells(cells == "G"),
        start_cells=_cells(cells == "P"),
        n_domes=_DOMES[name],
        rooms=rooms,
        ways=_ways(cells != "*", rooms),
    )
    for array in (made.free, made.blocks, made.dome_cells, made.start_cells, made.rooms, made.ways):
        array.setflags(write=False)
    return made


def wall_blocks(height: int, width: int, across: int | None = None) -> Bytes:
    """Blocks (H, W), highest y first, of the walls of a plan: three rows of ``across``, numbered 0..9 over and over.

    Without ``across`` there are as many in a row as the plan is wide, but not so that a column has one number.
    """
    if across is None:
        across = 3 * width // height
        across -= 10 % across == 0
    rows = np.searchsorted([i * height // 3 for i in range(1, 3)], np.arange(height), side="right")
    columns = np.searchsorted([j * width // across for j in range(1, across)], np.arange(width), side="right")
    return ((rows[:, None] * across + columns) % 10).astype(np.uint8)


def draw_scenes(plan: Layout, rng: np.random.Generator, n: int) -> Scene:
    """n episodes' wall colours and domes. Colours of domes run through all six, then repeat."""
    colours = rng.integers(len(WALL_COLOURS), size=(n, 10))
    walls = FIRST_WALL + colours[:, plan.blocks]
    grid = np.where(plan.free == 1, FLOOR, walls).astype(np.uint8)
    order = rng.permuted(np.tile(np.arange(len(plan.dome_cells)), (n, 1)), axis=1)[:, : plan.n_domes]
    domes = (plan.dome_cells[order] + 0.5).astype(np.float32)
    hues = (np.arange(plan.n_domes) % len(DOME_COLOURS)).astype(np.uint8)
    return Scene(grid, domes, np.tile(hues, (n, 1)))


def draw_starts(plan: Layout, rng: np.random.Generator, n: int) -> Floats:
    """n poses (n, 3): the middle of a start cell, any heading."""
    cells = plan.start_cells[rng.integers(len(plan.start_cells), size=n)]
    return np.column_stack([cells + 0.5, rng.uniform(-np.pi, np.pi, size=n)]).astype(np.float64)


def room_of(plan: Layout, position: Floats, before: int = 0) -> Bytes:
    """The room of every position (T, 2) of a walk; in a doorway the one last stood in (``before`` the walk)."""
    offset = position[:, None] - plan.rooms
    within = (offset >= 0) & (offset <= ROOM)
    inside = within[..., 0] & within[..., 1]
    last = np.maximum.accumulate(np.where(inside.any(axis=-1), np.arange(len(position)), -1))
    return np.where(last < 0, before, inside.argmax(axis=1)[last]).astype(np.uint8)


def _cells(where: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.argwhere(where)[:, ::-1].copy()


def _ring(height: int, width: int) -> npt.NDArray[np.int64]:
    """Rooms clockwise: along the top from left to right, back along the bottom, beginning at the lower left."""
    columns = range(0, width - 2, ROOM + 1)
    if height - 2 == ROOM:
        return np.array([(x, 0) for x in columns])
    top = [(x, ROOM + 1) for x in columns]
    bottom = [(x, 0) for x in columns]
    return np.array([bottom[0], *top, *bottom[:0:-1]])


def _ways(free: npt.NDArray[np.bool_], rooms: npt.NDArray[np.int64]) -> Floats:
    n = len(rooms)
    ways = np.zeros((n, 2, 9))
    for r in range(n):
        for turn, step in enumerate((1, -1)):
            ways[r, turn] = _way(free, rooms[r], rooms[(r + step) % n], (r + step) % n)
    return ways


def _way(free: npt.NDArray[np.bool_], here: npt.NDArray[np.int64], there: npt.NDArray[np.int64], room: int) -> Floats:
    along = int(here[0] == there[0])
    lateral = 1 - along
    sign = 1 if there[along] > here[along] else -1
    between = int(max(here[along], there[along])) - 1
    lanes = [
        lane
        for lane in (int(here[lateral]), int(here[lateral]) + ROOM - 1)
        if (free[lane, between] if along == 0 else free[between, lane])
    ]
    assert len(lanes) == 1, "rooms are joined by one doorway, at one end of their wall"
    low = lanes[0] == here[lateral]
    edge = float(lanes[0] if low else lanes[0] + 1)
    first, second = np.zeros(2), np.zeros(2)
    first[along], first[lateral] = here[along] + (ROOM if sign > 0 else 0), edge
    second[along], second[lateral] = there[along] + (ROOM if sign > 0 else 0), lanes[0] + 0.5
    goal = there[along] + (0.5 if sign > 0 else ROOM - 0.5)
    return np.array([*first, lateral, edge, *second, goal, sign, room], dtype=np.float64)
