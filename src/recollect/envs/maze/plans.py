"""Random mazes of rooms and corridors, in the manner of Memory Maze (arXiv 2210.13383).

Rooms and corridors lie on the odd cells of the grid, walls between them on the even ones. (1) Rooms of odd sides are
tried at random places and kept where they touch no other, until there are enough or too many tries failed. (2) What
odd cells are left become corridors, each a tree carved by a walk that goes on at random and steps back where it is
stuck. (3) Doors are opened between neighbouring regions in random order wherever they join what was apart; of the
others one in twenty is opened too, so there are ways round. (4) Corridors that end blind are filled up again. A maze
with fewer rooms than targets is drawn anew. Every free cell can be reached from every other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.envs.rooms.layouts import wall_blocks
from recollect.envs.rooms.scene import BRIGHT_FLOOR, FIRST_WALL, FLOOR, Bytes, Floats, Scene
from recollect.envs.rooms.textures import WALL_COLOURS

EXTRA_DOORS = 0.05
_TRIES = 60
_SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0))


class RoomRules(NamedTuple):
    """How many rooms of which sides are wanted."""

    most: int
    sides: tuple[int, ...]


class Plan(NamedTuple):
    """One maze."""

    cells: Bytes
    """(size + 2, size + 2) ``FLOOR`` of corridors, ``BRIGHT_FLOOR`` of rooms, ``FIRST_WALL`` for any wall."""
    rooms: list[tuple[int, int, int, int]]
    """Lowest row and column, and height and width, outer wall included."""


def draw_plan(rng: np.random.Generator, size: int, rules: RoomRules, least_rooms: int) -> Plan:
    """A maze of size x size cells inside its outer walls, ``size`` odd, with at least so many rooms."""
    while True:
        region = np.zeros((size + 2, size + 2), dtype=np.int64)
        rooms = _rooms(rng, region, rules)
        if len(rooms) >= least_rooms:
            break
    _corridors(rng, region, len(rooms))
    _doors(rng, region)
    _fill_blind_ends(region)
    cells = np.where(region == 0, FIRST_WALL, FLOOR).astype(np.uint8)
    for row, column, height, width in rooms:
        cells[row : row + height, column : column + width] = BRIGHT_FLOOR
    return Plan(cells, rooms)


def draw_scenes(rng: np.random.Generator, n: int, size: int, rules: RoomRules, n_targets: int) -> tuple[Scene, Floats]:
    """n mazes with a target in each of ``n_targets`` rooms, a colour for each of nine blocks of walls, and where to
    start: the middle of a cell of a room without a target in it, any heading, (n, 3).
    """
    blocks = wall_blocks(size + 2, size + 2, 3)[::-1]
    grid = np.empty((n, size + 2, size + 2), dtype=np.uint8)
    domes, starts = np.empty((n, n_targets, 2), dtype=np.float32), np.empty((n, 3))
    for i in range(n):
        plan = draw_plan(rng, size, rules, n_targets)
        colours = rng.integers(len(WALL_COLOURS), size=10)
        grid[i] = np.where(plan.cells < FIRST_WALL, plan.cells, FIRST_WALL + colours[blocks])
        taken = np.zeros(plan.cells.shape, dtype=np.bool_)
        for j, r in enumerate(rng.permutation(len(plan.rooms))[:n_targets]):
            row, column, height, width = plan.rooms[r]
            y, x = row + int(rng.integers(height)), column + int(rng.integers(width))
            taken[y, x] = True
            domes[i, j] = x - 0.5, y - 0.5
        free = np.argwhere((plan.cells == BRIGHT_FLOOR) & ~taken)
        y, x = free[rng.integers(len(free))]
        starts[i] = x - 0.5, y - 0.5, rng.uniform(-np.pi, np.pi)
    return Scene(grid, domes, np.tile(np.arange(n_targets, dtype=np.uint8), (n, 1))), starts


def _rooms(
    rng: np.random.Generator, region: npt.NDArray[np.int64], rules: RoomRules
) -> list[tuple[int, int, int, int]]:
    rooms: list[tuple[int, int, int, int]] = []
    size = len(region) - 2
    for _ in range(_TRIES):
        if len(rooms) == rules.most:
            break
        height, width = (int(side) for side in rng.choice(rules.sides, size=2))
        row = 1 + 2 * int(rng.integers((size - height) // 2 + 1))
        column = 1 + 2 * int(rng.integers((size - width) // 2 + 1))
        if not region[row - 1 : row + height + 1, column - 1 : column + width + 1].any():
            rooms.append((row, column, height, width))
            region[row : row + height, column : column + width] = len(rooms)
    return rooms


def _corridors(rng: np.random.Generator, region: npt.NDArray[np.int64], n_regions: int) -> None:
    size = len(region) - 2
    for row in range(1, size + 1, 2):
        for column in range(1, size + 1, 2):
            if region[row, column]:
                continue
            n_regions += 1
            region[row, column] = n_regions
            trail = [(row, column)]
            while trail:
                y, x = trail[-1]
                ways = [
                    (dy, dx)
                    for dy, dx in _SIDES
                    if 0 < y + 2 * dy <= size and 0 < x + 2 * dx <= size and not region[y + 2 * dy, x + 2 * dx]
                ]
                if not ways:
                    trail.pop()
                    continue
                dy, dx = ways[int(rng.integers(len(ways)))]
                region[y + dy, x + dx] = region[y + 2 * dy, x + 2 * dx] = n_regions
                trail.append((y + 2 * dy, x + 2 * dx))


def _doors(rng: np.random.Generator, region: npt.NDArray[np.int64]) -> None:
    size = len(region) - 2
    group = list(range(int(region.max()) + 1))
    between: list[tuple[int, int, int, int]] = []
    for y in range(1, size + 1):
        for x in range(1, size + 1):
            if (y + x) % 2 == 0 or region[y, x]:
                continue
            dy, dx = (1, 0) if x % 2 else (0, 1)
            a, b = int(region[y - dy, x - dx]), int(region[y + dy, x + dx])
            if a != b:
                between.append((y, x, a, b))
    for k in rng.permutation(len(between)):
        y, x, a, b = between[k]
        joins = group[a] != group[b]
        if joins or rng.random() < EXTRA_DOORS:
            region[y, x] = a
            old, new = group[b], group[a]
            group = [new if g == old else g for g in group]


def _fill_blind_ends(region: npt.NDArray[np.int64]) -> None:
    while True:
        free = region != 0
        ways = np.zeros(region.shape, dtype=np.int64)
        ways[1:-1, 1:-1] = free[2:, 1:-1].astype(int) + free[:-2, 1:-1] + free[1:-1, 2:].astype(int) + free[1:-1, :-2]
        blind = free & (ways <= 1)
        if not blind.any():
            return
        region[blind] = 0
