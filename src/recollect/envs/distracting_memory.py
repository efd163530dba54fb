"""Distracting Memory: remember a colour across a hallway of coloured floor (S4WM, arXiv 2307.02064).

A grid of ``width`` x 9 tiles, walls included. At the left end a room of 3 x 3 with a coloured tile, the cue; then a
hallway one tile high whose floor is coloured at random; at its right end a T-junction with an object (a coloured tile)
two tiles above and one two tiles below the hallway. Exactly one of the two has the colour of the cue::

    #####################     C cue, O objects, . floor, : floor with distractors, S start
    #                 #.#
    #####             #O#
    #...###############.#
    #...::::::S:::::::::.#    (not to scale)
    #..C###############.#
    #####             #O#
    #                 #.#
    #####################

The agent sees 5 x 5 tiles around itself; the view does not turn with it and nothing hides what is behind a wall. Beyond
the grid there are walls. An episode ends when the agent steps on an object; reward 1 if that has the cue's colour.

The scripted episode starts in the middle of the hallway facing right, walks to the right end, from where both objects
are seen, turns, walks to the left end, from where the cue is seen, turns and walks back to the start: 2 ``width`` - 1
frames, the **context**. Then the **query**: right to the junction, a turn, two steps on to one of the objects, each
with probability 1/2: ``width // 2`` + 1 frames. Both lengths are exact for every width because the start is column
``width - width // 2``. Width 100 gives 199 and 51. Neither cue nor objects are seen from the start.

What the paper does not say is decided here: distractors lie on the hallway only (not in the room or the junction), the
two objects always differ, and which of them matches is independent of which is visited, so the reward is a fair coin
and neither the cue nor the object tells it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.envs.base import Frames
from recollect.envs.grid_world import FORWARD, LEFT, MARGIN, RIGHT, STEPS, VIEW, GridConfig, GridWorld, in_margin, views
from recollect.envs.tiles import COLOURS, EMPTY, FIRST_COLOUR, N_FLOOR_CODES, WALL, Bytes, agent_code

HEIGHT, MIDDLE = 9, 4
MIN_WIDTH = 11
CUE = (3, MIDDLE + 1)


class Layout(NamedTuple):
    """Everything random about n episodes. Colours are indices into ``COLOURS``."""

    distractors: Bytes
    """(n, width - 6) over hallway columns 4 .. width - 3: 0 for empty floor, 1 + colour otherwise."""
    cue: Bytes
    """(n,) colour of the cue."""
    objects: Bytes
    """(n, 2) colours of the objects above and below."""
    goal: Bytes
    """(n,) the object that the script visits: 0 above, 1 below."""


class Script(NamedTuple):
    """The scripted episode for either goal: arrays (2, T), T = ``episode_length``."""

    action: Bytes
    """Action that led to the frame; 0 at the first, where there was none."""
    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    heading: Bytes


class DistractingMemory(GridWorld):
    """The environment, for stepping. ``generate`` makes scripted episodes many times faster.

    Actions: 0 turn left, 1 turn right, 2 forward (into a wall: nothing happens). Observations and ends as every
    ``GridWorld``. ``reset(options={"layout": Layout})`` plays the first episode of a given layout.
    """

    @dataclass(frozen=True)
    class Config(GridConfig, kind="distracting-memory"):
        """Remember a colour across a hallway of coloured floor, ``width`` tiles long with its walls.

        Raises ConfigError for a width below 11 (the cue would be seen from the start), a probability outside 0..1, or
        a number of colours outside 2..4.
        """

        actions: ClassVar[tuple[str, ...]] = ("left", "right", "forward")
        n_codes: ClassVar[int] = N_FLOOR_CODES
        constant: ClassVar[tuple[str, ...]] = ("cue", "objects", "goal")
        rewarded: ClassVar[bool] = True

        width: int = 100
        p_distractor: float = 0.5
        n_colours: int = len(COLOURS)

        def __post_init__(self) -> None:
            if self.width < MIN_WIDTH:
                raise ConfigError(f"{self.kind}: width must be at least {MIN_WIDTH}, got {self.width}")
            if not 0 <= self.p_distractor <= 1:
                raise ConfigError(f"{self.kind}: p_distractor must lie in 0..1, got {self.p_distractor}")
            if not 2 <= self.n_colours <= len(COLOURS):
                raise ConfigError(f"{self.kind}: n_colours must lie in 2..{len(COLOURS)}, got {self.n_colours}")

        @property
        def start(self) -> int:
            """Column where the episode starts, and where its context ends."""
            return self.width - self.width // 2

        @property
        def context_length(self) -> int:
            """Frames up to the return to the start, 2 width - 1."""
            return 2 * self.width - 1

        @property
        def query_length(self) -> int:
            """Frames from there to an object, width // 2 + 1."""
            return self.width // 2 + 1

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> DistractingMemory:
            """The environment, for stepping."""
            return DistractingMemory(self, observation="pixels" if pixels else "tiles", render_mode=render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            """Scripted episodes; see the function of the same name."""
            return generate(self, rng, n_episodes)

        def oracle(self, frames: Frames) -> dict[str, float]:
            """``reward``: how often the reward at the object is what its colour and the cue's, both seen, foretell."""
            return {"reward": float((foretold(self, frames) == frames["reward"][:, -1]).mean())}

    def __init__(
        self,
        config: Config | None = None,
        *,
        observation: Literal["tiles", "pixels"] = "tiles",
        render_mode: str | None = None,
    ) -> None:
        self.config = DistractingMemory.Config() if config is None else config
        super().__init__(self.config, observation, render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """A new episode from the environment's own generator, or from ``options["layout"]``."""
        super().reset(seed=seed)
        given = (options or {}).get("layout")
        self._layout = draw(self.config, self.np_random, 1) if given is None else Layout(*(part[:1] for part in given))
        return self._begin(paint(self.config, self._layout)[0], self.config.start, MIDDLE)

    def hidden_state(self) -> dict[str, Any]:
        """What the observation does not show: position (x, y), heading, colours of cue and objects, and the goal."""
        self._known()
        return {
            "position": (self._x, self._y),
            "heading": self._heading,
            "cue": int(self._layout.cue[0]),
            "objects": (int(self._layout.objects[0, 0]), int(self._layout.objects[0, 1])),
            "goal": int(self._layout.goal[0]),
        }

    def scripted_actions(self) -> Bytes:
        """The actions (episode_length - 1,) of the scripted policy from the start of this episode to its goal."""
        return script(self.config).action[self.hidden_state()["goal"], 1:]

    def _use(self, action: int, x: int, y: int) -> None:
        """There is nothing to use."""

    def _outcome(self) -> tuple[float, bool]:
        reached = self._x == self.config.width - 2 and abs(self._y - MIDDLE) == 2
        matches = self._layout.objects[0, int(self._y > MIDDLE)] == self._layout.cue[0]
        return float(reached and matches), reached


def generate(config: DistractingMemory.Config, rng: np.random.Generator, n_episodes: int) -> Frames:
    """Scripted episodes of T = ``config.episode_length`` frames, as arrays (n, T, ...).

    ``tiles`` (5, 5) uint8; ``action`` uint8, index of the action that led to the frame (0 at the first); ``reward``
    float32, 1 or 0 at the last frame; ``is_first``, ``is_last``, ``is_terminal`` bool. For probing: ``position`` (2,)
    int32 (x, y), ``heading`` uint8, ``cue`` uint8, ``objects`` (2,) uint8, ``goal`` uint8.
    Cost: about 40 bytes and one lookup of 25 tiles per frame; no loop over episodes or frames.
    """
    return play(config, draw(config, rng, n_episodes))


def draw(config: DistractingMemory.Config, rng: np.random.Generator, n: int) -> Layout:
    """The random part of n episodes."""
    shape = (n, config.width - 6)
    coloured = rng.random(shape) < config.p_distractor
    distractors = np.where(coloured, rng.integers(1, config.n_colours, size=shape, endpoint=True), 0)
    cue = rng.integers(config.n_colours, size=n)
    other = (cue + rng.integers(1, config.n_colours, size=n)) % config.n_colours
    match_below = rng.integers(2, size=n) == 1
    objects = np.where(match_below[:, None], np.stack([other, cue], 1), np.stack([cue, other], 1))
    goal = rng.integers(2, size=n)
    return Layout(*(part.astype(np.uint8) for part in (distractors, cue, objects, goal)))


def paint(config: DistractingMemory.Config, layout: Layout) -> Bytes:
    """Tile codes without the agent, (n, 13, width + 4): the grid in a margin of two walls."""
    grid = np.full((HEIGHT, config.width), EMPTY, dtype=np.uint8)
    grid[[0, -1]], grid[:, [0, -1]] = WALL, WALL
    grid[[MIDDLE - 2, MIDDLE + 2], :5] = WALL
    grid[[MIDDLE - 1, MIDDLE + 1], 4:-2] = WALL
    grid[:, -3] = WALL
    ground, inner = in_margin(grid, len(layout.cue))
    hall = layout.distractors
    inner[:, MIDDLE, 4:-2] = np.where(hall == 0, EMPTY, hall + (FIRST_COLOUR - 1))
    inner[:, CUE[1], CUE[0]] = layout.cue + FIRST_COLOUR
    inner[:, [MIDDLE - 2, MIDDLE + 2], -2] = layout.objects + FIRST_COLOUR
    return ground


@cache
def script(config: DistractingMemory.Config) -> Script:
    """What the scripted policy does, for either goal; every array is read-only."""
    to_right, to_left, back = config.width - 2 - config.start, config.width - 3, config.start - 1
    about = [LEFT, LEFT]
    context = [FORWARD] * to_right + about + [FORWARD] * to_left + about + [FORWARD] * back
    rows: list[list[tuple[int, int, int, int]]] = []
    for turn in (LEFT, RIGHT):
        x, y, heading = config.start, MIDDLE, 0
        rows.append([(0, x, y, heading)])
        for action in [*context, *[FORWARD] * to_right, turn, FORWARD, FORWARD]:
            if action == FORWARD:
                x, y = x + int(STEPS[heading][0]), y + int(STEPS[heading][1])
            else:
                heading = (heading + (1 if action == RIGHT else -1)) % 4
            rows[-1].append((action, x, y, heading))
    action, x, y, heading = np.array(rows, dtype=np.int64).transpose(2, 0, 1)
    arrays = Script(action.astype(np.uint8), x, y, heading.astype(np.uint8))
    for array in arrays:
        array.setflags(write=False)
    return arrays


def play(config: DistractingMemory.Config, layout: Layout) -> Frames:
    """The scripted episodes of a layout, with the keys of ``generate``."""
    n, T = len(layout.cue), config.episode_length
    ground, moves, goal = paint(config, layout), script(config), layout.goal
    tiles = np.empty((n, T, VIEW, VIEW), dtype=np.uint8)
    for side in (0, 1):
        rows = np.flatnonzero(goal == side)
        tiles[rows] = views(ground[rows], moves.x[side], moves.y[side])
    tiles[:, :, MARGIN, MARGIN] = agent_code(tiles[:, :, MARGIN, MARGIN], moves.heading[goal])

    first, last = np.zeros((n, T), dtype=np.bool_), np.zeros((n, T), dtype=np.bool_)
    first[:, 0], last[:, -1] = True, True
    visited = layout.objects[np.arange(n), goal]
    reward = np.zeros((n, T), dtype=np.float32)
    reward[:, -1] = visited == layout.cue
    return {
        "tiles": tiles,
        "action": moves.action[goal],
        "reward": reward,
        "is_first": first,
        "is_last": last,
        "is_terminal": last.copy(),
        "position": np.stack([moves.x[goal], moves.y[goal]], axis=-1).astype(np.int32),
        "heading": moves.heading[goal],
        "cue": np.repeat(layout.cue[:, None], T, axis=1),
        "objects": np.repeat(layout.objects[:, None], T, axis=1),
        "goal": np.repeat(goal[:, None], T, axis=1),
    }


def foretold(config: DistractingMemory.Config, frames: Frames) -> npt.NDArray[np.bool_]:
    """Rewards (n,) that a map of the context's tiles foretells; where a tile was not seen, none."""
    n = len(frames["tiles"])
    x, y, heading = np.full(n, config.start), np.full(n, MIDDLE), np.zeros(n, dtype=np.int64)
    seen = np.full((n, HEIGHT + 2 * MARGIN, config.width + 2 * MARGIN), EMPTY, dtype=np.uint8)
    rows, window = np.arange(n)[:, None, None], np.arange(VIEW)
    for t in range(config.episode_length):
        action = frames["action"][:, t].astype(np.int64) if t else np.full(n, LEFT)
        moved = (action == FORWARD)[:, None] * STEPS[heading]
        x, y = x + moved[:, 0], y + moved[:, 1]
        if t:
            heading = (heading + (action == RIGHT) - (action == LEFT)) % 4
        if t < config.context_length:
            seen[rows, (y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]] = frames["tiles"][:, t]
    cue = seen[:, CUE[1] + MARGIN, CUE[0] + MARGIN]
    reached = seen[np.arange(n), y + MARGIN, x + MARGIN]
    return (cue == reached) & (cue >= FIRST_COLOUR)
