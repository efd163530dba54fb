"""First-person pictures of scenes, on a CPU.

A ray caster of our own, not the renderer of the papers (MuJoCo): geometry, camera and colours follow Memory Maze,
shading and textures do not, so errors measured on these pictures compare with each other and not with published ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.envs.rooms.scene import DOME_RGB, SIZE, Bytes, Floats, Scene
from recollect.envs.rooms.textures import textures


class Seen(NamedTuple):
    """What pictures have shown of n worlds, 1 or 0."""

    cells: Bytes
    """(n, H, W): a ray of some picture crossed the cell or ended at it."""
    domes: Bytes
    """(n, S)"""


def render(
    scene: Scene,
    poses: Floats,
    index: npt.NDArray[np.int64] | None = None,
    *,
    seen: Seen | None = None,
    threads: int = 1,
) -> Bytes:
    """Pictures (m, 64, 64, 3) from poses (m, 3), each (x, y, heading), of worlds ``index`` (m,); None: one pose each.

    The same pose of the same world gives the same bytes, whatever else is drawn and on however many threads. What was
    seen is added to ``seen`` where given. About 60 microseconds a picture. Raises ConfigError for shapes that do not
    match, or a camera outside the grid.
    """
    from recollect.envs.rooms import raycast
    from recollect.envs.rooms.compiled import over_rows, plain

    poses = plain(poses, np.float64)
    n, height, width = scene.grid.shape
    rows = plain(np.arange(len(poses)) if index is None else index, np.int64)
    if poses.ndim != 2 or poses.shape[1] != 3 or rows.shape != poses.shape[:1]:
        raise ConfigError(f"render: poses are (m, 3) and index (m,), got {poses.shape} and {rows.shape}")
    if len(poses) and not (rows.min() >= 0 and rows.max() < n):
        raise ConfigError(f"render: index must lie in 0..{n - 1}, got {rows.min()}..{rows.max()}")
    inside = (poses[:, :2] > 0) & (poses[:, :2] < (width - 2, height - 2))
    if not (inside.all() and np.isfinite(poses).all()):
        raise ConfigError(f"render: poses must lie within the outer walls, 0..{width - 2} by 0..{height - 2}")
    if seen is None:
        seen = nothing_seen(scene)
    made, out = textures(), np.empty((len(poses), SIZE, SIZE, 3), dtype=np.uint8)
    grid, domes = plain(scene.grid, np.uint8), plain(scene.domes, np.float32)
    rgb = plain(255.0 * DOME_RGB[scene.colours], np.float32)
    over_rows(
        len(poses),
        threads,
        lambda begin, end: raycast.render_frames(
            begin, end, poses, rows, grid, domes, rgb, *made, seen.cells, seen.domes, out
        ),
    )
    return out


def reduced(images: Bytes, side: int) -> Bytes:
    """Pictures (..., 64, 64, 3) averaged over squares to (..., side, side, 3), rounded half up."""
    k = SIZE // side
    if k == 1:
        return images
    squares = images.reshape(*images.shape[:-3], side, k, side, k, 3)
    total = squares.sum(axis=(-4, -2), dtype=np.uint32)
    return ((total + k * k // 2) // (k * k)).astype(np.uint8)


def nothing_seen(scene: Scene) -> Seen:
    """What is known before the first picture."""
    return Seen(np.zeros(scene.grid.shape, dtype=np.uint8), np.zeros(scene.colours.shape, dtype=np.uint8))
