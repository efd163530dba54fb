"""How the agent moves: a ball that rolls and steers, four actions a second.

The rolling ball of Memory Maze, idealised (MuJoCo's was measured once, the numbers below are its own to a few percent):
``forward`` drives the speed towards 1 cell/s at a rate of 6/s, a turn drives the yaw rate towards 73.6 degrees/s at
20/s; without them both go to zero at the same rates. So a step forward at full speed is a quarter of a cell, the first
one about half of that and half of the last is rolled after letting go, and a turn is 18.4 degrees. An action lasts five
sub-steps of 0.05 s: speed and yaw rate follow their exponentials exactly, and the ball moves along the mean heading. A
ball of 0.1 cells is pushed out of walls it touches, along the shortest way; what speed is left is how fast it came
forward. So it slides along walls, slowly unless it meets them at a small angle; MuJoCo's sticks to them and turns to
face them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recollect.envs.rooms.compiled import Array, compiled, inner
from recollect.envs.rooms.scene import FIRST_WALL

ACTIONS = ("noop", "forward", "left", "right", "forward_left", "forward_right")
NOOP, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(6)
STATE = 5
"""Numbers of a state: x, y, heading, speed, yaw rate."""

SPEED, ROLL_RATE = 1.0, 6.0
YAW_RATE, STEER_RATE = math.radians(73.6), 20.0
BALL = 0.2 / 2.0
SUBSTEPS, SUBSTEP = 5, 0.05
_ROLL, _STEER = math.exp(-ROLL_RATE * SUBSTEP), math.exp(-STEER_RATE * SUBSTEP)
_ROLLED, _STEERED = (1.0 - _ROLL) / ROLL_RATE, (1.0 - _STEER) / STEER_RATE


@inner
def _out_of_walls(x: float, y: float, grid: Array) -> tuple[float, float]:
    """The nearest place where the ball touches no wall; twice, for corners."""
    for _ in range(2):
        cx, cy = math.floor(x) + 1, math.floor(y) + 1
        for iy in range(max(cy - 1, 0), min(cy + 2, grid.shape[0])):
            for ix in range(max(cx - 1, 0), min(cx + 2, grid.shape[1])):
                if grid[iy, ix] < FIRST_WALL or (ix == cx and iy == cy):
                    continue
                dx = x - min(max(x, ix - 1.0), float(ix))
                dy = y - min(max(y, iy - 1.0), float(iy))
                apart = math.sqrt(dx * dx + dy * dy)
                if 0.0 < apart < BALL:
                    x += dx / apart * (BALL - apart)
                    y += dy / apart * (BALL - apart)
    return x, y


@inner
def step(states: Array, t: int, action: int, grid: Array) -> None:
    """Row t of ``states`` (T, 5): a quarter of a second after row t - 1."""
    drive = SPEED if action == FORWARD or action >= FORWARD_LEFT else 0.0
    steer = 0.0
    if action in (LEFT, FORWARD_LEFT):
        steer = YAW_RATE
    elif action in (RIGHT, FORWARD_RIGHT):
        steer = -YAW_RATE
    x, y, heading = states[t - 1, 0], states[t - 1, 1], states[t - 1, 2]
    speed, yaw = states[t - 1, 3], states[t - 1, 4]
    for _ in range(SUBSTEPS):
        turned = steer * SUBSTEP + (yaw - steer) * _STEERED
        yaw = steer + (yaw - steer) * _STEER
        rolled = drive * SUBSTEP + (speed - drive) * _ROLLED
        speed = drive + (speed - drive) * _ROLL
        cos, sin = math.cos(heading + 0.5 * turned), math.sin(heading + 0.5 * turned)
        heading += turned
        new_x, new_y = _out_of_walls(x + rolled * cos, y + rolled * sin, grid)
        if rolled > 1e-9:
            came = ((new_x - x) * cos + (new_y - y) * sin) / rolled
            speed *= min(max(came, 0.0), 1.0)
        x, y = new_x, new_y
    if heading > math.pi:
        heading -= 2.0 * math.pi
    elif heading < -math.pi:
        heading += 2.0 * math.pi
    states[t, 0], states[t, 1], states[t, 2], states[t, 3], states[t, 4] = x, y, heading, speed, yaw


@compiled
def replay(states: Array, actions: Array, grid: Array) -> None:
    """Fill ``states`` (T, 5) from its first row; ``actions[t]`` (T,) uint8 leads to row t."""
    for t in range(1, len(states)):
        action: Any = np.int64(actions[t])  # one type of action, one compilation of ``step``
        step(states, t, action, grid)
