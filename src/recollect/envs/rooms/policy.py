"""The scripted policy of the rooms: explore the room for a while, go to the next, all around the ring.

*Explore*: forward 2 to 4 steps, ending early near a wall that lies ahead; then turn: 0 to 2 steps in the open, 5 to 7
away from a wall, 8 to 12 in a corner; and so on. *Switch*: turn until within 10 degrees of a waypoint, one step, again.
An attempt is given up where the agent strays from the room it explores, or needs more than 25 moves to a waypoint or
more than 14 turns for one of them; then the whole episode is tried again from its start with further random numbers.
"""

from __future__ import annotations

import math

import numpy as np

from recollect.envs.rooms.compiled import Array, compiled
from recollect.envs.rooms.dice import between
from recollect.envs.rooms.motion import FORWARD, LEFT, NOOP, RIGHT, STATE, advance

MAX_MOVES, MAX_TURNS = 25, 14
ATTEMPTS = 10_000
"""So many failures in a row mean a plan that cannot be walked."""
_COS_AIM = math.cos(math.radians(10.0))
_ROOM, _NEAR = 3.0, 1.0


@compiled
def _away_from(toward: float) -> int:
    """The turn that leads away sooner from a wall, given the cross product of its direction and the heading."""
    return LEFT if toward >= 0.0 else RIGHT


@compiled
def _ahead(state: Array, room: Array) -> tuple[float, float]:
    """For x and y: -1 or 1 where a wall of the room is near on that side and lies ahead, else 0."""
    x, y = state[0] - room[0], state[1] - room[1]
    dx, dy = math.cos(state[2]), math.sin(state[2])
    near_x = -1.0 if x < _NEAR and dx < 0 else 1.0 if x > _ROOM - _NEAR and dx > 0 else 0.0
    near_y = -1.0 if y < _NEAR and dy < 0 else 1.0 if y > _ROOM - _NEAR and dy > 0 else 0.0
    return near_x, near_y


@compiled
def _explore(states: Array, actions: Array, t: int, until: int, room: Array, grid: Array, stream: Array) -> int:
    """From step t to step ``until``; returns it, or -1 where the attempt is given up."""
    if t >= until:
        return -1
    turning = between(stream, 1, 3) != 1
    while True:
        action = FORWARD
        if not turning:
            steps = between(stream, 2, 4)
        else:
            near_x, near_y = _ahead(states[t], room)
            dx, dy = math.cos(states[t, 2]), math.sin(states[t, 2])
            if near_x != 0.0 and near_y != 0.0:
                action, steps = between(stream, LEFT, RIGHT), between(stream, 8, 12)
            elif near_x != 0.0:
                action, steps = _away_from(near_x * dy), between(stream, 5, 7)
            elif near_y != 0.0:
                action, steps = _away_from(-near_y * dx), between(stream, 5, 7)
            else:
                action, steps = between(stream, LEFT, RIGHT), between(stream, 0, 2)
        for _ in range(steps):
            t += 1
            actions[t] = action
            states[t] = states[t - 1]
            advance(states[t], action, grid)
            if t == until:
                return t
            if action == FORWARD:
                x, y = states[t, 0] - room[0], states[t, 1] - room[1]
                if not (0.0 <= x <= _ROOM and 0.0 <= y <= _ROOM):
                    return -1
                near_x, near_y = _ahead(states[t], room)
                if near_x != 0.0 or near_y != 0.0:
                    break
        turning = not turning


@compiled
def _toward(states: Array, actions: Array, t: int, last: int, x: float, y: float, grid: Array) -> int:
    """One move towards (x, y), after turning to it; the step it ends at, or -1."""
    dx, dy = x - states[t, 0], y - states[t, 1]
    length = math.sqrt(dx * dx + dy * dy)
    if length < 1e-9:
        return -1
    dx, dy = dx / length, dy / length
    left = math.sin(states[t, 2]) * dx - math.cos(states[t, 2]) * dy < 0.0
    turns = 0
    while True:
        aimed = math.cos(states[t, 2]) * dx + math.sin(states[t, 2]) * dy >= _COS_AIM
        if t >= last or (not aimed and turns >= MAX_TURNS):
            return -1
        t += 1
        turns += 1
        actions[t] = FORWARD if aimed else LEFT if left else RIGHT
        states[t] = states[t - 1]
        advance(states[t], actions[t], grid)
        if aimed:
            return t


@compiled
def _switch(states: Array, actions: Array, t: int, last: int, way: Array, grid: Array) -> int:
    """Through the doorway that ``way`` (see ``Layout.ways``) describes; the step it ends at, or -1."""
    lateral = int(way[2])
    moves = 0
    while abs(states[t, lateral] - way[3]) >= 0.5:
        moves += 1
        t = _toward(states, actions, t, last, way[0], way[1], grid) if moves <= MAX_MOVES else -1
        if t < 0:
            return -1
    moves = 0
    while (states[t, 1 - lateral] - way[6]) * way[7] < 0.0:
        moves += 1
        t = _toward(states, actions, t, last, way[4], way[5], grid) if moves <= MAX_MOVES else -1
        if t < 0:
            return -1
    return t


@compiled
def _walk(
    states: Array,
    actions: Array,
    last: int,
    first_room: int,
    rooms: Array,
    ways: Array,
    schedule: Array,
    grid: Array,
    stream: Array,
    switches: Array,
) -> bool:
    """One attempt at steps 1 .. ``last``; False where it is given up."""
    turn, t, room = between(stream, 0, 1), 0, first_room
    for k in range(len(schedule)):
        switches[k] = between(stream, schedule[k, 0], schedule[k, 1])
    for k in range(len(schedule)):
        t = _explore(states, actions, t, switches[k], rooms[room], grid, stream)
        if t < 0:
            return False
        t = _switch(states, actions, t, last, ways[room, turn], grid)
        if t < 0:
            return False
        room = int(ways[room, turn, 8])
    return _explore(states, actions, t, last, rooms[room], grid, stream) == last


@compiled
def play_rooms(
    begin: int,
    end: int,
    starts: Array,
    seeds: Array,
    rooms: Array,
    ways: Array,
    schedule: Array,
    copied: Array,
    replayed: int,
    grid: Array,
    states: Array,
    actions: Array,
    switches: Array,
    attempts: Array,
) -> None:
    """Episodes begin .. end - 1, from poses ``starts`` (n, 3) and streams ``seeds`` (n,). Filled are ``states`` (n, T, 5),
    ``actions`` (n, T), ``switches`` (n, K), when rooms were left, and ``attempts`` (n,), how often it was tried, above
    ``ATTEMPTS`` where in vain. ``schedule`` (K, 2) bounds the switches. With ``replayed`` above 0 a teleport leads back
    to frame ``copied`` (n,), and the last ``replayed`` frames are what followed that.
    """
    n_frames = states.shape[1]
    last = n_frames - 1 if replayed == 0 else n_frames - 2 - replayed
    for i in range(begin, end):
        stream = seeds[i : i + 1].copy()
        room = 0
        for r in range(len(rooms)):
            x, y = starts[i, 0] - rooms[r, 0], starts[i, 1] - rooms[r, 1]
            if 0.0 <= x <= _ROOM and 0.0 <= y <= _ROOM:
                room = r
        for k in range(STATE):
            states[i, 0, k] = starts[i, k] if k < 3 else 0.0
        actions[i, 0] = NOOP
        attempts[i] = 1
        while not _walk(states[i], actions[i], last, room, rooms, ways, schedule, grid[i], stream, switches[i]):
            attempts[i] += 1
            if attempts[i] > ATTEMPTS:
                return
        if replayed > 0:
            for k in range(replayed + 1):
                states[i, last + 1 + k] = states[i, copied[i] + k]
                actions[i, last + 1 + k] = actions[i, copied[i] + k] if k > 0 else np.uint8(NOOP)
