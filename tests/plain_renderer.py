"""The renderer of the rooms written plainly: every pixel alone, every wall and dome tried. Slow, for tests."""

from __future__ import annotations

import math

import numpy as np

from recollect.envs.rooms.scene import (
    CAMERA_AHEAD,
    CAMERA_HEIGHT,
    DOME_RGB,
    FIELD_OF_VIEW,
    FIRST_WALL,
    RADIUS,
    SIZE,
    TILT,
    WALL_HEIGHT,
    Scene,
)
from recollect.envs.rooms.textures import TEXELS, textures

FOCAL = SIZE / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))


def sample(pattern: int, u: float, v: float, texels: float, *, clamped: bool) -> float:
    """A pattern between texels at the level whose texels are about a pixel."""
    level = min(max(math.ceil(math.log2(texels / 1.42)), 0), 6)
    size = TEXELS >> level
    start = sum((TEXELS >> k) ** 2 for k in range(level))
    table = textures().patterns[pattern, start : start + size * size].reshape(size, size).astype(float)
    x, y = u * size - 0.5, v * size - 0.5
    y = min(max(y, 0.0), size - 1.0) if clamped else y
    ix, iy = math.floor(x), math.floor(y)
    total = 0.0
    for dy, wy in ((0, 1 - (y - iy)), (1, y - iy)):
        for dx, wx in ((0, 1 - (x - ix)), (1, x - ix)):
            row = min(iy + dy, size - 1) if clamped else (iy + dy) % size
            total += wx * wy * table[row, (ix + dx) % size]
    return total


def trace(scene: Scene, pose: tuple[float, float, float], row: float, column: float) -> tuple[object, list[float]]:
    """What is met at a point of the picture (a pixel's middle is a half): its name, and its colour."""
    x, y, heading = pose
    cos, sin = math.cos(heading), math.sin(heading)
    x, y = x + CAMERA_AHEAD * cos, y + CAMERA_AHEAD * sin
    right = (column - SIZE / 2) / FOCAL
    down = (row - SIZE / 2) / FOCAL + TILT
    dx, dy = cos + right * sin, sin - right * cos
    made = textures()

    best, colour = math.inf, [float(k) for k in made.sky[min(max(int(row), 0), SIZE - 1)]]
    name: object = "sky"
    if down > 0:
        best, name = CAMERA_HEIGHT / down, "floor"
        px, py = x + best * dx, y + best * dy
        height, width = scene.grid.shape[1:]
        inside = -1 <= px < width - 1 and -1 <= py < height - 1
        code = int(scene.grid[0, math.floor(py) + 1, math.floor(px) + 1]) if inside else 0
        tint = made.tints[code if code < FIRST_WALL else 0]
        value = sample(0, px, py, TEXELS * best / FOCAL * max(1, 0.5 * best / CAMERA_HEIGHT), clamped=False)
        colour = [float(tint[0, k] + value * tint[1, k]) for k in range(3)]

    first, wall = math.inf, None  # all walls are equally high: only the nearest along a ray counts
    for iy, ix in np.argwhere(scene.grid[0] >= FIRST_WALL):
        for axis, side in ((0, ix - 1), (0, ix), (1, iy - 1), (1, iy)):
            along = (dx, dy)[axis]
            if along == 0:
                continue
            t = (side - (x, y)[axis]) / along
            px, py = x + t * dx, y + t * dy
            across = (py - (iy - 1)) if axis == 0 else (px - (ix - 1))
            if not 0 < t < first or not 0 <= across <= 1:
                continue
            first = t
            z = CAMERA_HEIGHT - t * down
            if t >= best or not 0 <= z <= WALL_HEIGHT:
                wall = None
                continue
            code = int(scene.grid[0, iy, ix])
            footprint = max(0.7 / max(abs(along), 0.02), 1 / WALL_HEIGHT) * t / FOCAL * TEXELS
            value = sample(1 + code % 2, py if axis == 0 else px, 1 - z / WALL_HEIGHT, footprint, clamped=True)
            tint, bright = made.tints[code], (1.0, 0.82)[axis]
            wall = (
                ("wall", int(iy), int(ix), axis),
                [bright * float(tint[0, k] + value * tint[1, k]) for k in range(3)],
            )
    if first < best and wall is not None:
        best, (name, colour) = first, wall

    for i, (cx, cy) in enumerate(scene.domes[0].astype(float)):
        ox, oy = x - cx, y - cy
        a = dx * dx + dy * dy + down * down
        b = ox * dx + oy * dy - CAMERA_HEIGHT * down
        c = ox * ox + oy * oy + CAMERA_HEIGHT**2 - RADIUS**2
        if b * b < a * c:
            continue
        t = (-b - math.sqrt(b * b - a * c)) / a
        z = CAMERA_HEIGHT - t * down
        if not 0 < t < min(best, first) or z < 0:
            continue
        normal = np.array([ox + t * dx, oy + t * dy, z]) / RADIUS
        toward = -np.array([dx, dy, -down]) / math.sqrt(a)
        light = 0.34 + 0.36 * normal[2] + 0.36 * float(normal @ toward)
        best, name = t, ("dome", i)
        colour = [min(255.0, 255 * light * float(k)) for k in DOME_RGB[scene.colours[0, i]]]
    return name, colour


def within_one_surface(scene: Scene, pose: tuple[float, float, float], row: int, column: int, name: object) -> bool:
    """Whether the surroundings of a pixel's middle show what it shows, so that no edge was softened there."""
    y, x = row + 0.5, column + 0.5
    around = [(y + 0.49, x), (y - 0.49, x), *((y + dy, x + dx) for dy in (-0.9, 0.9) for dx in (-0.9, 0.9))]
    return all(trace(scene, pose, *point)[0] == name for point in around)
