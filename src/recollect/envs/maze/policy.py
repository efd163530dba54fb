"""The scripted policy of the mazes: walk to one random cell after another by a shortest way, with noise.

A goal is a free cell, uniform; the way there follows falling distances from cell to cell, aiming at the middle of the
next. More than 45 degrees off: turn; more than 10: forward and turn; else forward. With probability ``noise`` a step is
a uniformly random action instead. The policy does not know the targets.
"""

from __future__ import annotations

import math

import numpy as np

from recollect.envs.rooms.compiled import Array, compiled, inner
from recollect.envs.rooms.dice import between, chance
from recollect.envs.rooms.motion import (
    BALL,
    FORWARD,
    FORWARD_LEFT,
    FORWARD_RIGHT,
    LEFT,
    NOOP,
    RIGHT,
    step,
)
from recollect.envs.rooms.scene import FIRST_WALL, RADIUS

TOUCH = math.sqrt((RADIUS + BALL) ** 2 - BALL**2)
"""How far apart the middles of a dome and of a ball on the floor are when they touch."""
_AIM, _TURN = math.radians(10.0), math.radians(45.0)


@compiled
def touch(state: Array, domes: Array, target: int, stream: Array) -> int:
    """The next target if ``target`` is touched: any other, each with the same probability; else ``target``."""
    dx, dy = state[0] - domes[target, 0], state[1] - domes[target, 1]
    if len(domes) == 1 or dx * dx + dy * dy > TOUCH * TOUCH:
        return target
    other = between(stream, 0, len(domes) - 2)
    return other if other < target else other + 1


@inner
def _distances(grid: Array, goal_y: int, goal_x: int, far: Array, queue: Array) -> None:
    """Steps from every cell of the grid to the goal; -1 for walls."""
    far[:] = -1
    far[goal_y, goal_x] = 0
    queue[0, 0], queue[0, 1] = goal_y, goal_x
    head, tail = 0, 1
    while head < tail:
        y, x = queue[head, 0], queue[head, 1]
        head += 1
        for k in range(4):
            ny, nx = y + (k == 0) - (k == 1), x + (k == 2) - (k == 3)
            if grid[ny, nx] < FIRST_WALL and far[ny, nx] < 0:
                far[ny, nx] = far[y, x] + 1
                queue[tail, 0], queue[tail, 1] = ny, nx
                tail += 1


@inner
def _heading_for(state: Array, far: Array) -> float:
    """How far to the left the middle of the next cell on the way lies, in radians."""
    cy, cx = math.floor(state[1]) + 1, math.floor(state[0]) + 1
    best_y, best_x = cy, cx
    for k in range(4):
        ny, nx = cy + (k == 0) - (k == 1), cx + (k == 2) - (k == 3)
        if 0 <= far[ny, nx] < far[best_y, best_x]:
            best_y, best_x = ny, nx
    off = math.atan2(best_y - 0.5 - state[1], best_x - 0.5 - state[0]) - state[2]
    return off - 2.0 * math.pi * math.floor(off / (2.0 * math.pi) + 0.5)


@compiled
def play_maze(
    begin: int,
    end: int,
    seeds: Array,
    noise: float,
    grid: Array,
    domes: Array,
    states: Array,
    actions: Array,
    targets: Array,
    rewards: Array,
) -> None:
    """Episodes begin .. end - 1, with streams ``seeds`` (n, 2) of the policy and of the targets.

    ``states`` (n, T, 5), ``actions``, ``targets`` and ``rewards`` (n, T) are filled from their first step on.
    """
    height, width = grid.shape[1:]
    far, queue = np.empty((height, width), dtype=np.int64), np.empty((height * width, 2), dtype=np.int64)
    for i in range(begin, end):
        stream, draws = seeds[i, 0:1], seeds[i, 1:2]
        reached = True
        for t in range(1, states.shape[1]):
            state = states[i, t - 1]
            cy, cx = math.floor(state[1]) + 1, math.floor(state[0]) + 1
            while reached or far[cy, cx] == 0:
                reached = False
                gy, gx = between(stream, 1, height - 2), between(stream, 1, width - 2)
                if grid[i, gy, gx] < FIRST_WALL and not (gy == cy and gx == cx):
                    _distances(grid[i], gy, gx, far, queue)
                else:
                    reached = True
            if chance(stream) < noise:
                action = between(stream, NOOP, FORWARD_RIGHT)
            else:
                off = _heading_for(state, far)
                action = FORWARD
                if off > _TURN:
                    action = LEFT
                elif off < -_TURN:
                    action = RIGHT
                elif off > _AIM:
                    action = FORWARD_LEFT
                elif off < -_AIM:
                    action = FORWARD_RIGHT
            actions[i, t] = action
            step(states[i], t, action, grid[i])
            targets[i, t] = touch(states[i, t], domes[i], targets[i, t - 1], draws)
            rewards[i, t] = 1.0 if targets[i, t] != targets[i, t - 1] else 0.0
