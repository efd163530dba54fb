"""Scripted walks through Multi Doors Keys: what is drawn at random, where everything stands, and what the agent does.

All episodes of a batch walk side by side, one *visit* at a time. A visit goes to a door or to a key's alcove, does one
thing there, and is made of ten runs of equal actions (turn, go, turn, go, ...); runs are cut where the frames end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.envs.grid_world import FORWARD, LEFT, RIGHT, STEPS
from recollect.envs.tiles import COLOURS, Bytes

PICKUP, TOGGLE = 3, 4
HEIGHT = 9
DOOR_ROW, TOP, MIDDLE, BOTTOM, OPENING, KEY_ROW = 2, 3, 4, 5, 6, 7

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Layout(NamedTuple):
    """Everything random about N episodes with n doors and n keys. Colours are indices into ``COLOURS``."""

    door_colours: Bytes
    """(N, n) from left to right."""
    key_colours: Bytes
    """(N, n) from left to right: the doors' colours in another order."""
    tour: Bytes
    """(N, 2 n) order in which the context visits the doors 0 .. n - 1 and the keys n .. 2 n - 1."""
    key_order: Bytes
    """(N, n) order in which the query picks up the keys."""
    choices: npt.NDArray[np.uint16]
    """(N, S) one number for every later choice."""


class Walk(NamedTuple):
    """What N agents do in T frames."""

    action: Bytes
    """(N, T) action that led to the frame; 0 at the first, where there was none."""
    opened: Ints
    """(N, n) frame at which each door opened; T: never."""
    taken: Ints
    """(N, n) frame at which each key was picked up; T: never."""
    attempted: Ints
    """(N,) how often a door was tried."""


def width(n: int) -> int:
    """Columns of the grid, walls included."""
    return 4 * n + 1


def columns(n: int) -> Ints:
    """(n,) columns of the doors, and of the keys below them."""
    return 4 * np.arange(n) + 2


def start(n: int) -> int:
    """Column where an episode starts, in the middle row, facing right."""
    return 2 * n


def n_choices(n: int, attempts: int, frames: int) -> int:
    """Choices that a walk may need: the tries, and a place to go to at random every five frames at most."""
    return (attempts + 1) * n + frames // 5 + 3


def walk(layout: Layout, context: int, query: int, attempts: int) -> Walk:
    """The scripted walks of ``context`` + ``query`` frames.

    Context: every door and every key in the order of ``tour``, nothing opened or picked up; then others at random.
    Query: for each key, pick it up and try ``attempts`` doors, drawn from those still locked but for the one just
    tried (fewer where there are none). With all keys picked up, the doors that are still locked. Then any place at
    random. Either part ends where its frames do. A door that is open when visited is gone through, into its alcove.
    """
    party = _Party(layout, context + query)
    n = layout.door_colours.shape[1]
    party.limit = context - 1
    for k in range(2 * n):
        party.visit(layout.tour[:, k].astype(np.int64))
    while not party.done():
        party.visit(*party.choose(party.anywhere()))
    party.limit = context + query - 1
    for k in range(n):
        party.visit(n + layout.key_order[:, k].astype(np.int64), use=True)
        for _ in range(attempts):
            party.visit(*party.choose(party.locked), use=True)
    for _ in range(n):
        party.visit(*party.choose(party.locked), use=True)
    while not party.done():
        party.visit(*party.choose(party.anywhere()))
    return party.walk()


class _Party:
    """N agents somewhere on their walks."""

    def __init__(self, layout: Layout, frames: int) -> None:
        self.layout, self.frames = layout, frames
        self.N, self.n = layout.door_colours.shape
        self.rows = np.arange(self.N)
        self.x = np.full(self.N, start(self.n))
        self.y = np.full(self.N, MIDDLE)
        self.heading = np.zeros(self.N, dtype=np.int64)
        self.limit = 0
        self.now = np.zeros(self.N, dtype=np.int64)
        """The frame that each has reached."""
        self.going = np.ones(self.N, dtype=np.bool_)
        self.last = np.full(self.N, -1)
        self.chosen = np.zeros(self.N, dtype=np.int64)
        """Choices that each has made: its walk must not depend on who walks beside it."""
        self.carried = np.zeros((self.N, len(COLOURS)), dtype=np.int64)
        self.opened, self.taken = np.full((2, self.N, self.n), frames)
        self.attempted = np.zeros(self.N, dtype=np.int64)
        self.actions: list[Ints] = []
        self.counts: list[Ints] = []

    @property
    def locked(self) -> Mask:
        """(N, n)"""
        return self.opened == self.frames

    def anywhere(self) -> Mask:
        """(N, 2 n)"""
        return np.ones((self.N, 2 * self.n), dtype=np.bool_)

    def done(self) -> bool:
        return bool((self.now == self.limit).all())

    def choose(self, allowed: Mask) -> tuple[Ints, Mask]:
        """One of the allowed places (N, ...) each, but not the last one; and whether there was any."""
        left = allowed & (np.arange(allowed.shape[1]) != self.last[:, None])
        count = left.sum(axis=1)
        number = self.layout.choices[self.rows, self.chosen].astype(np.int64) * count >> 16
        self.chosen += self.now < self.limit
        return (left.cumsum(axis=1) > number[:, None]).argmax(axis=1), count > 0

    def visit(self, place: Ints, going: Mask | None = None, *, use: bool = False) -> None:
        """Go to a door (0 .. n - 1) or a key's alcove (n .. 2 n - 1), and open it or pick it up if it is to be used."""
        self.going = self.now < self.limit if going is None else going & (self.now < self.limit)
        self.last = np.where(self.going, place, self.last)
        is_door, i = place < self.n, place % self.n
        column = columns(self.n)[i]
        self._turn(np.where(self.y < TOP, 1, np.where(self.y > BOTTOM, 3, self.heading)))
        self._go(np.abs(np.clip(self.y, TOP, BOTTOM) - self.y))
        self._turn(np.where(column > self.x, 0, np.where(column < self.x, 2, self.heading)))
        self._go(np.abs(column - self.x))
        self._turn(np.where(is_door, 3, 1))
        self._go(np.abs(np.where(is_door, TOP, OPENING) - self.y))
        if use:
            used = self._run(np.where(is_door, TOGGLE, PICKUP), np.ones(self.N, dtype=np.int64)) == 1
            self._pick_up(used & ~is_door, i)
            self._toggle(used & is_door, i)
        arrived = (self.x == column) & (self.y == TOP) & (self.heading == 3)
        self._go(np.where(is_door & arrived & ~self.locked[self.rows, i], 2, 0))

    def walk(self) -> Walk:
        """What was done, once all have reached the last frame."""
        counts, actions = np.stack(self.counts, axis=1), np.stack(self.actions, axis=1)
        action = np.zeros((self.N, self.frames), dtype=np.uint8)
        action[:, 1:] = np.repeat(actions.astype(np.uint8).ravel(), counts.ravel()).reshape(self.N, self.frames - 1)
        return Walk(action, self.opened, self.taken, self.attempted)

    def _run(self, action: Ints, count: Ints) -> Ints:
        """The same action several times, as often as frames are left: how often."""
        count = np.where(self.going, np.minimum(count, self.limit - self.now), 0)
        self.now = self.now + count
        self.actions.append(action)
        self.counts.append(count)
        return count

    def _turn(self, heading: Ints) -> None:
        quarters = (heading - self.heading) % 4
        clockwise = quarters == 1
        turns = self._run(np.where(clockwise, RIGHT, LEFT), np.where(clockwise, 1, 4 - quarters) % 4)
        self.heading = (self.heading + np.where(clockwise, turns, -turns)) % 4

    def _go(self, distance: Ints) -> None:
        steps = self._run(np.full(self.N, FORWARD), distance)
        self.x = self.x + STEPS[self.heading, 0] * steps
        self.y = self.y + STEPS[self.heading, 1] * steps

    def _pick_up(self, who: Mask, key: Ints) -> None:
        rows = self.rows[who]
        self.taken[rows, key[who]] = self.now[who]
        self.carried[rows, self.layout.key_colours[rows, key[who]]] += 1

    def _toggle(self, who: Mask, door: Ints) -> None:
        self.attempted += who
        colour = self.layout.door_colours[self.rows, door]
        fits = who & self.locked[self.rows, door] & (self.carried[self.rows, colour] > 0)
        rows = self.rows[fits]
        self.opened[rows, door[fits]] = self.now[fits]
        self.carried[rows, colour[fits]] -= 1
