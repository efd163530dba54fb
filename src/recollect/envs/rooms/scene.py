"""What there is to see: grids of walls, domes, and the numbers of the camera.

Lengths are in cells; Memory Maze's cells are 2.0 of its units wide. x grows to the right and y upwards on a plan, and
(0, 0) is the lower left corner of the cells inside the outer walls, as in Memory Maze's ``agent_pos``. Headings are
angles from the x axis, counterclockwise.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float64]

SIZE = 64
"""Rows and columns of a picture."""
CELL = 2.0
"""Units of Memory Maze in a cell."""
WALL_HEIGHT = 1.5 / CELL
RADIUS = 0.6 / CELL
"""Of a dome: a sphere whose centre is on the floor."""
CAMERA_HEIGHT = 0.9 / CELL
CAMERA_AHEAD = 0.15 / CELL
FIELD_OF_VIEW = 80.0
"""Degrees, in both directions."""
TILT = 0.1
"""Tangent of the angle by which the camera looks down. Drawn as a shift of the horizon: uprights stay upright."""

FLOOR, BRIGHT_FLOOR, FIRST_WALL = 0, 1, 2
"""Codes of a grid: two floors, then a wall of each colour."""

DOME_COLOURS = ("red", "green", "blue", "purple", "yellow", "salmon")
DOME_RGB: npt.NDArray[np.float32] = np.array(
    [(170, 38, 30), (99, 170, 88), (39, 140, 217), (93, 105, 199), (220, 193, 59), (220, 128, 107)],
    dtype=np.float32,
) / np.float32(220)
"""In 0..1."""
DOME_RGB.setflags(write=False)


class Scene(NamedTuple):
    """n worlds, each seen from any number of poses."""

    grid: Bytes
    """(n, H, W) codes, outer walls included, lowest y first: position (x, y) lies in ``grid[y + 1, x + 1]``."""
    domes: npt.NDArray[np.float32]
    """(n, S, 2) centres (x, y)."""
    colours: Bytes
    """(n, S) index into ``DOME_COLOURS``."""

    def take(self, rows: npt.NDArray[np.int64] | slice) -> Scene:
        """Some of the worlds."""
        return Scene(self.grid[rows], self.domes[rows], self.colours[rows])


def free_cells(grid: Bytes) -> Bytes:
    """Memory Maze's ``maze_layout`` (..., H - 2, W - 2): 1 where one can walk, lowest y first."""
    return (grid[..., 1:-1, 1:-1] < FIRST_WALL).astype(np.uint8)


def seen_from(points: npt.NDArray[np.float32], position: Floats, heading: Floats) -> npt.NDArray[np.float32]:
    """Memory Maze's ``targets_vec`` (..., S, 2): points (..., S, 2) as (to the right, ahead) of an agent (..., 2)."""
    offset = points.astype(np.float64) - position[..., None, :]
    cos, sin = np.cos(heading)[..., None], np.sin(heading)[..., None]
    right = offset[..., 0] * sin - offset[..., 1] * cos
    ahead = offset[..., 0] * cos + offset[..., 1] * sin
    return np.stack([right, ahead], axis=-1).astype(np.float32)
