"""The loops of the renderer: one ray per column through the grid, then walls, floor and sky, then domes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recollect.envs.rooms.compiled import Array, compiled, inner
from recollect.envs.rooms.scene import (
    CAMERA_AHEAD,
    CAMERA_HEIGHT,
    FIELD_OF_VIEW,
    FIRST_WALL,
    RADIUS,
    SIZE,
    TILT,
    WALL_HEIGHT,
)
from recollect.envs.rooms.textures import LEVELS, TEXELS

FOCAL = SIZE / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
HORIZON = SIZE / 2 - FOCAL * TILT
SIDE = 0.82
"""Brightness of walls that face along y, where those that face along x have 1."""
_F: Any = np.float32


@inner
def _start_of(level: int) -> int:
    """Where a level of a pattern begins."""
    start, size = 0, TEXELS * TEXELS
    for _ in range(level):
        start += size
        size //= 4
    return start


@inner
def _level_of(texels: float) -> int:
    """The level at which ``texels`` of the finest become about one."""
    level = 0
    while texels > 1.42 and level < LEVELS - 1:
        texels *= 0.5
        level += 1
    return level


@inner
def _paint(pixel: Array, tint: Array, value: float, share: float) -> None:
    """Mix a wall or floor of the given pattern value into a pixel."""
    for k in range(3):
        pixel[k] += share * (tint[0, k] + value * tint[1, k])


@inner
def _floor_at(pattern: Array, start: int, size: int, x: float, y: float) -> float:
    """The floor's pattern at (x, y), between texels; it repeats with every cell."""
    fx, fy = _F(x * size - 0.5), _F(y * size - 0.5)
    ix, iy = math.floor(fx), math.floor(fy)
    ax, ay = fx - _F(ix), fy - _F(iy)
    x0, x1 = ix & (size - 1), (ix + 1) & (size - 1)
    y0, y1 = start + (iy & (size - 1)) * size, start + ((iy + 1) & (size - 1)) * size
    top = pattern[y0 + x0] + ax * (pattern[y0 + x1] - pattern[y0 + x0])
    bottom = pattern[y1 + x0] + ax * (pattern[y1 + x1] - pattern[y1 + x0])
    return top + ay * (bottom - top)


@inner
def _cast(grid: Array, x: float, y: float, dx: float, dy: float, crossed: Array) -> tuple[float, bool, int, int]:
    """Follow a ray to the first wall: its distance in lengths of (dx, dy), whether that faces along y, its cell."""
    ix, iy = math.floor(x), math.floor(y)
    step_x, step_y = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
    per_x = abs(1.0 / dx) if dx != 0.0 else 1e30
    per_y = abs(1.0 / dy) if dy != 0.0 else 1e30
    next_x = (ix + 1 - x if dx > 0 else x - ix) * per_x
    next_y = (iy + 1 - y if dy > 0 else y - iy) * per_y
    while True:
        crossed[iy, ix] = 1
        along_y = next_y < next_x
        if along_y:
            distance, iy, next_y = next_y, iy + step_y, next_y + per_y
        else:
            distance, ix, next_x = next_x, ix + step_x, next_x + per_x
        if ix < 0 or iy < 0 or iy >= grid.shape[0] or ix >= grid.shape[1]:  # only from outside the outer walls
            return distance, along_y, min(max(iy, 0), grid.shape[0] - 1), min(max(ix, 0), grid.shape[1] - 1)
        if grid[iy, ix] >= FIRST_WALL:
            crossed[iy, ix] = 1
            return distance, along_y, iy, ix


@inner
def render_walls(
    pose: Array, grid: Array, patterns: Array, tints: Array, sky: Array, crossed: Array, depth: Array, out: Array
) -> None:
    """Everything but domes, column by column; ``depth`` (SIZE,) is how far the wall of a column lies ahead."""
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    # The grid's first cell is an outer wall.
    x, y = pose[0] + 1.0 + CAMERA_AHEAD * cos, pose[1] + 1.0 + CAMERA_AHEAD * sin
    pixel = np.zeros(3, dtype=np.float32)
    for column in range(SIZE):
        across = (column + 0.5 - SIZE / 2) / FOCAL
        dx, dy = cos + across * sin, sin - across * cos
        distance, along_y, iy, ix = _cast(grid, x, y, dx, dy, crossed)
        distance = max(distance, 1e-3)
        depth[column] = distance
        top = HORIZON - FOCAL * (WALL_HEIGHT - CAMERA_HEIGHT) / distance
        bottom = HORIZON + FOCAL * CAMERA_HEIGHT / distance
        code = grid[iy, ix]
        tint, pattern = tints[code], patterns[1 + (code & 1)]
        bright = _F(1.0) if not along_y else _F(SIDE)

        # Along a column of a wall only v changes.
        facing = abs(dy) if along_y else abs(dx)
        level = _level_of(TEXELS * distance / FOCAL * max(1.0 / max(facing, 0.02) * 0.7, 1.0 / WALL_HEIGHT))
        start, size = _start_of(level), TEXELS >> level
        u = _F((x + distance * dx if along_y else y + distance * dy) * size - 0.5)
        iu = math.floor(u)
        au = u - _F(iu)
        u0, u1 = start + (iu & (size - 1)), start + ((iu + 1) & (size - 1))
        v_step = _F(size / (bottom - top))
        v_first = _F((0.5 - top) * size / (bottom - top) - 0.5)

        first, last = min(max(math.floor(top), 0), SIZE), min(max(math.ceil(bottom), 0), SIZE)
        for row in range(first):
            for k in range(3):
                out[row, column, k] = np.uint8(sky[row, k] + _F(0.5))
        for row in range(first, last):
            v = min(max(v_first + _F(row) * v_step, _F(0.0)), _F(size - 1))
            iv = int(v)
            av = v - _F(iv)
            v0, v1 = iv * size, min(iv + 1, size - 1) * size
            a = pattern[v0 + u0] + au * (pattern[v0 + u1] - pattern[v0 + u0])
            b = pattern[v1 + u0] + au * (pattern[v1 + u1] - pattern[v1 + u0])
            value = a + av * (b - a)
            if row >= top and row + 1 <= bottom:
                for k in range(3):
                    out[row, column, k] = np.uint8(bright * (tint[0, k] + value * tint[1, k]) + _F(0.5))
                continue
            # A row on an edge of the wall shows each side by its share.
            above, below = _F(min(max(top - row, 0.0), 1.0)), _F(min(max(row + 1 - bottom, 0.0), 1.0))
            for k in range(3):
                pixel[k] = _F(0.5) + above * sky[row, k]
            _paint(pixel, tint, value, bright * (_F(1.0) - above - below))
            if below > 0:
                near = distance * 0.999
                value = _floor_at(patterns[0], start, size, x + near * dx, y + near * dy)
                code = grid[math.floor(y + near * dy), math.floor(x + near * dx)]
                _paint(pixel, tints[code if code < FIRST_WALL else 0], value, below)
            for k in range(3):
                out[row, column, k] = np.uint8(pixel[k])
        for row in range(last, SIZE):
            away = CAMERA_HEIGHT * FOCAL / (row + 0.5 - HORIZON)
            level = _level_of(TEXELS * away / FOCAL * max(1.0, 0.5 * away / CAMERA_HEIGHT))
            fx, fy = x + away * dx, y + away * dy
            value = _floor_at(patterns[0], _start_of(level), TEXELS >> level, fx, fy)
            code = grid[int(fy), int(fx)]
            tint = tints[code if code < FIRST_WALL else 0]
            for k in range(3):
                out[row, column, k] = np.uint8(tint[0, k] + value * tint[1, k] + _F(0.5))


@inner
def render_domes(pose: Array, domes: Array, rgb: Array, depth: Array, visible: Array, out: Array) -> None:
    """Domes over what is drawn, the farthest first. They have one size and never touch, so that order is depth."""
    n = domes.shape[0]
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    x, y = pose[0] + CAMERA_AHEAD * cos, pose[1] + CAMERA_AHEAD * sin
    order = np.empty(n, dtype=np.int64)
    place: Any = np.empty((3, n))
    ahead, aside, far = place[0], place[1], place[2]
    farthest = 0.0
    for column in range(SIZE):
        farthest = max(farthest, depth[column])
    count = 0
    for i in range(n):
        ox, oy = domes[i, 0] - x, domes[i, 1] - y
        ahead[i], aside[i], far[i] = ox * cos + oy * sin, ox * sin - oy * cos, ox * ox + oy * oy
        if ahead[i] + RADIUS <= 0.02 or ahead[i] - RADIUS >= farthest:
            continue
        at = count
        while at > 0 and far[order[at - 1]] < far[i]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
        count += 1
    for j in range(count):
        i = order[j]
        _render_dome(aside[i], ahead[i], rgb[i], depth, visible[i : i + 1], out)


@inner
def _render_dome(cx: float, cz: float, rgb: Array, depth: Array, visible: Array, out: Array) -> None:
    """One dome ``cx`` to the right and ``cz`` ahead of the camera, where neither floor nor wall hides it."""
    near, beyond = max(cz - RADIUS, 0.02), cz + RADIUS
    left, right = cx - RADIUS, cx + RADIUS
    first = math.floor(SIZE / 2 + FOCAL * left / (near if left < 0 else beyond)) - 1
    last = math.ceil(SIZE / 2 + FOCAL * right / (near if right > 0 else beyond)) + 1
    top = math.floor(HORIZON + FOCAL * (CAMERA_HEIGHT - RADIUS) / beyond) - 1
    bottom = math.ceil(HORIZON + FOCAL * CAMERA_HEIGHT / near) + 1
    cc = cx * cx + cz * cz + CAMERA_HEIGHT * CAMERA_HEIGHT
    for column in range(max(first, 0), min(last + 1, SIZE)):
        if depth[column] <= near:
            continue
        across = (column + 0.5 - SIZE / 2) / FOCAL
        for row in range(max(top, 0), min(bottom + 1, SIZE)):
            down = (row + 0.5 - HORIZON) / FOCAL
            pp = across * across + down * down + 1.0
            pc = across * cx + down * CAMERA_HEIGHT + cz
            if pc <= 0.0:
                continue
            middle = pc / pp
            gap = cc - pc * middle  # squared distance of the ray from the centre
            share = (RADIUS - math.sqrt(max(gap, 0.0))) * FOCAL / middle + 0.5
            if share <= 0.0:
                continue
            t = middle - math.sqrt(max(RADIUS * RADIUS - gap, 0.0) / pp)
            if t <= 0.0 or t >= depth[column]:
                continue
            # Where the dome meets the floor its edge is as soft as its outline.
            share = min(share, (CAMERA_HEIGHT - t * down) * FOCAL / t + 0.5, 1.0)
            if share <= 0.0:
                continue
            up = (CAMERA_HEIGHT - t * down) / RADIUS
            facing = (pc - t * pp) / (RADIUS * math.sqrt(pp))
            light = 0.34 + 0.36 * max(up, 0.0) + 0.36 * max(facing, 0.0)
            visible[0] = 1
            for k in range(3):
                colour = min(light * rgb[k], 255.0)
                out[row, column, k] = np.uint8(out[row, column, k] * (1.0 - share) + colour * share + 0.5)


@compiled
def render_frames(
    begin: int,
    end: int,
    poses: Array,
    index: Array,
    grid: Array,
    domes: Array,
    dome_rgb: Array,
    patterns: Array,
    tints: Array,
    sky: Array,
    crossed: Array,
    visible: Array,
    out: Array,
) -> None:
    """Frames begin .. end - 1: frame f shows world ``index[f]`` from ``poses[f]``."""
    depth = np.empty(SIZE)
    for f in range(begin, end):
        i = index[f]
        render_walls(poses[f], grid[i], patterns, tints, sky, crossed[i], depth, out[f])
        if domes.shape[1] > 0:
            render_domes(poses[f], domes[i], dome_rgb[i], depth, visible[i], out[f])
