"""The scripted policy of the rooms: explore the room for a while, go to the next, all around the ring.

*Explore*: forward 2 to 4 steps, ending early near a wall that lies ahead; then turn: 0 to 2 steps in the open, 5 to 7
away from a wall, 8 to 12 in a corner; and so on. *Switch*: turn until within 10 degrees of a waypoint, one step, again.
An attempt is given up where the agent strays from the room it explores, or needs more than 25 moves to a waypoint or
more than 14 turns for one move; then the whole episode is tried again from its start with further random numbers.
"""

from __future__ import annotations

import math

from recollect.envs.rooms.compiled import Array, compiled, inner
from recollect.envs.rooms.dice import between, roll
from recollect.envs.rooms.motion import FORWARD, LEFT, RIGHT, step

MAX_MOVES, MAX_TURNS = 25, 14
ATTEMPTS = 10_000
"""So many failures in a row mean a plan that cannot be walked."""
_COS_AIM = math.cos(math.radians(10.0))
_ROOM, _NEAR = 3.0, 1.0


@inner
def _ahead(states: Array, t: int, left: float, low: float) -> tuple[float, float]:
    """For x and y: -1 or 1 where a wall of the room is near on that side and lies ahead, else 0."""
    x, y = states[t, 0] - left, states[t, 1] - low
    dx, dy = math.cos(states[t, 2]), math.sin(states[t, 2])
    near_x = -1.0 if x < _NEAR and dx < 0 else 1.0 if x > _ROOM - _NEAR and dx > 0 else 0.0
    near_y = -1.0 if y < _NEAR and dy < 0 else 1.0 if y > _ROOM - _NEAR and dy > 0 else 0.0
    return near_x, near_y


@inner
def _turn(states: Array, t: int, left: float, low: float, stream: Array) -> tuple[int, int]:
    """Which way to turn, and for how many steps. From one wall alone it is the way that leads off it sooner."""
    near_x, near_y = _ahead(states, t, left, low)
    if near_x != 0.0 and near_y != 0.0:
        return between(stream, LEFT, RIGHT), between(stream, 8, 12)
    if near_x == 0.0 and near_y == 0.0:
        return between(stream, LEFT, RIGHT), between(stream, 0, 2)
    across = near_x * math.sin(states[t, 2]) - near_y * math.cos(states[t, 2])
    return (LEFT if across >= 0.0 else RIGHT), between(stream, 5, 7)


@inner
def _reached(states: Array, t: int, way: Array, waypoint: int) -> bool:
    """Whether the first (1) or the second (2) waypoint of ``way`` (see ``Layout.ways``) is reached."""
    lateral = int(way[2])
    if waypoint == 2:
        return (states[t, 1 - lateral] - way[6]) * way[7] >= 0.0
    return abs(states[t, lateral] - way[3]) < 0.5


@inner
def _walk(
    states: Array,
    actions: Array,
    last: int,
    room: int,
    rooms: Array,
    ways: Array,
    schedule: Array,
    grid: Array,
    stream: Array,
    switches: Array,
) -> bool:
    """One attempt at steps 1 .. ``last``; False where it is given up.

    It is written as one loop over steps, with one call of the motion: compiling it takes a fraction of the time.
    """
    ring, n = roll(stream) % 2, len(schedule)
    for k in range(n):
        switches[k] = between(stream, schedule[k, 0], schedule[k, 1])
    done, until = 0, switches[0] if n > 0 else last
    waypoint = 0  # 0: exploring, else on the way to the first or second one
    turning, steps = between(stream, 1, 3) == 1, 0  # of exploring: what was done before, and for how many more steps
    moves, turns = 0, 0  # of switching: towards the waypoint, and within the move
    side, dx, dy = LEFT, 0.0, 0.0
    for t in range(1, last + 1):
        left, low = rooms[room, 0], rooms[room, 1]
        if waypoint == 0:
            while steps == 0:
                turning = not turning
                if turning:
                    side, steps = _turn(states, t - 1, left, low, stream)
                else:
                    steps = between(stream, 2, 4)
            steps -= 1
            action = side if turning else FORWARD
        else:
            cos, sin = math.cos(states[t - 1, 2]), math.sin(states[t - 1, 2])
            if turns == 0:
                dx = ways[room, ring, 4 * waypoint - 4] - states[t - 1, 0]
                dy = ways[room, ring, 4 * waypoint - 3] - states[t - 1, 1]
                length = max(math.sqrt(dx * dx + dy * dy), 1e-9)
                dx, dy = dx / length, dy / length
                side = LEFT if sin * dx - cos * dy < 0.0 else RIGHT
            aimed = cos * dx + sin * dy >= _COS_AIM
            if moves >= MAX_MOVES or (not aimed and turns >= MAX_TURNS):
                return False
            turns = 0 if aimed else turns + 1
            moves += 1 if aimed else 0
            action = FORWARD if aimed else side

        actions[t] = action
        step(states, t, action, grid)

        if waypoint == 0 and t == until:
            waypoint, moves, turns = 1, 0, 0
            if done == n:
                return True
        elif waypoint == 0 and not turning:
            x, y = states[t, 0] - left, states[t, 1] - low
            if not (0.0 <= x <= _ROOM and 0.0 <= y <= _ROOM):
                return False
            near_x, near_y = _ahead(states, t, left, low)
            if near_x != 0.0 or near_y != 0.0:
                steps = 0
        if waypoint == 1 and turns == 0 and _reached(states, t, ways[room, ring], waypoint):
            waypoint, moves = 2, 0
        if waypoint == 2 and turns == 0 and _reached(states, t, ways[room, ring], waypoint):
            room, done = int(ways[room, ring, 8]), done + 1
            until = switches[done] if done < n else last
            if t >= until:
                return False
            waypoint, turning, steps = 0, between(stream, 1, 3) == 1, 0
    return False


@compiled
def play_rooms(
    begin: int,
    end: int,
    first: Array,
    seeds: Array,
    rooms: Array,
    ways: Array,
    schedule: Array,
    grid: Array,
    states: Array,
    actions: Array,
    switches: Array,
    attempts: Array,
) -> None:
    """Episodes begin .. end - 1, from poses ``states[:, 0]`` in rooms ``first`` (n,), with streams ``seeds`` (n,).

    Filled are the rest of ``states`` (n, T, 5), ``actions`` (n, T), ``switches`` (n, K), when rooms were left, and
    ``attempts`` (n,), how often it was tried: above ``ATTEMPTS`` where in vain. ``schedule`` (K, 2) bounds the
    switches.
    """
    last = states.shape[1] - 1
    for i in range(begin, end):
        stream = seeds[i : i + 1]
        attempts[i] = 0
        through = False
        while not through and attempts[i] <= ATTEMPTS:
            attempts[i] += 1
            through = _walk(states[i], actions[i], last, first[i], rooms, ways, schedule, grid[i], stream, switches[i])
