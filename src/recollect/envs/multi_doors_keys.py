"""Multi Doors Keys: reason about which doors can be opened with the keys one holds (S4WM, arXiv 2307.02064).

A corridor three tiles high. Along its top a locked door every four columns, each leading to an alcove three tiles
wide; below every door, along the bottom, an opening to an alcove with a key. For n = 3 doors and as many keys::

    #############     D locked doors, k keys, S start
    #   #   #   #
    ##D###D###D##
    #           #
    #     S     #
    #           #
    ## ### ### ##
    # k # k # k #
    #############

The agent sees 5 x 5 tiles around itself; the view does not turn with it and nothing hides what is behind a wall. From
the top row of the corridor a door and its alcove are seen, but no key; from an opening its key, but no door. What the
agent carries is not seen. A key opens one locked door of its colour and is consumed; several doors may share a colour.

In the **context** the scripted agent goes to every door and every key and leaves all as it is: (4 n^2 + 15 n - 5)
frames. In the **query** it picks up the keys in random order, tries two doors after each, then those that are still
locked: (17 n^2 + 70 n - 15) / 2 frames, rounded up. These are 76 and 174 frames for 3 doors, 170 and 380 for 5, 296
and 654 for 7, as published; for other numbers they are the parabolas through these. Whether a door opens follows from
the colours of doors and keys, the keys picked up, and those consumed: from memory alone.

What the paper does not say is decided here:

- *Size.* The alcoves are one tile high, so the grid has 4 n + 1 x 9 tiles, and the key lies in the middle of its own.
- *Colours.* Doors are coloured independently, each colour equally likely. The keys have the colours of the doors in
  another order: in the end every door can be opened.
- *Rules.* Any number of keys is carried at a time, so that what opens a door is a count by colour. An open door stays
  open. Keys are picked up from the tile before them and stand in the way until then. Nothing is rewarded and nothing
  ends the episode: what is to be predicted is what is seen.
- *Walks.* Context: the 2 n doors and keys in random order, from the middle of the corridor, which fits in any order;
  what is left of the context goes on to other places at random. Query: ``attempts`` doors are tried after each key,
  drawn from the locked ones but for the one just tried. When all doors are open, after half of the query on average,
  the walk goes on at random as before and meets every change again. The agent goes into the alcove behind a door that
  it has opened or finds open. Both parts end where their frames do, wherever the agent is.
- *Actions* are those of MiniGrid that are needed: left, right, forward, pickup, toggle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from recollect.core.errors import ConfigError
from recollect.envs.base import Frames
from recollect.envs.door_key_oracle import foretell, scores
from recollect.envs.door_key_walks import (
    BOTTOM,
    DOOR_ROW,
    HEIGHT,
    KEY_ROW,
    MIDDLE,
    OPENING,
    PICKUP,
    TOGGLE,
    Ints,
    Layout,
    Walk,
    columns,
    n_choices,
    start,
    walk,
    width,
)
from recollect.envs.grid_world import FORWARD, LEFT, MARGIN, RIGHT, STEPS, VIEW, GridConfig, GridWorld, in_margin, views
from recollect.envs.tiles import COLOURS, EMPTY, FIRST_KEY, FIRST_LOCKED, FIRST_OPEN, WALL, Bytes, agent_code

MAX_DOORS = 20


class MultiDoorsKeys(GridWorld):
    """The environment, for stepping. ``generate`` makes scripted episodes many times faster.

    Actions: 0 turn left, 1 turn right, 2 forward, 3 pick up, 4 toggle: open. The last two act on the tile ahead; what
    is not possible changes nothing. Observations and ends as every ``GridWorld``.
    ``reset(options={"layout": Layout})`` plays the first episode of a given layout.
    """

    @dataclass(frozen=True)
    class Config(GridConfig, kind="multi-doors-keys"):
        """Reason about which doors can be opened: ``n_doors`` locked doors and as many keys, used up one by one.

        ``attempts``: doors tried after each key. Raises ConfigError for less than 1 door or more than 20 (a block of
        episodes would take over 0.2 GB), colours outside 2..4, attempts outside 1..20.
        """

        actions: ClassVar[tuple[str, ...]] = ("left", "right", "forward", "pickup", "toggle")
        constant: ClassVar[tuple[str, ...]] = ("door_colours", "key_colours")
        judged: ClassVar[bool] = True

        n_doors: int = 3
        n_colours: int = len(COLOURS)
        attempts: int = 2

        def __post_init__(self) -> None:
            if not 1 <= self.n_doors <= MAX_DOORS:
                raise ConfigError(f"{self.kind}: n_doors must lie in 1..{MAX_DOORS}, got {self.n_doors}")
            if not 2 <= self.n_colours <= len(COLOURS):
                raise ConfigError(f"{self.kind}: n_colours must lie in 2..{len(COLOURS)}, got {self.n_colours}")
            if not 1 <= self.attempts <= MAX_DOORS:
                raise ConfigError(f"{self.kind}: attempts must lie in 1..{MAX_DOORS}, got {self.attempts}")

        @property
        def context_length(self) -> int:
            """Frames in which nothing is picked up or opened, 4 n^2 + 15 n - 5."""
            return 4 * self.n_doors**2 + 15 * self.n_doors - 5

        @property
        def query_length(self) -> int:
            """Frames from there to the end, (17 n^2 + 70 n - 15) / 2 rounded up."""
            return (17 * self.n_doors**2 + 70 * self.n_doors - 14) // 2

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> MultiDoorsKeys:
            """The environment, for stepping."""
            return MultiDoorsKeys(self, observation="pixels" if pixels else "tiles", render_mode=render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            """Scripted episodes; see the function of the same name."""
            return generate(self, rng, n_episodes)

        def oracle(self, frames: Frames) -> dict[str, float]:
            """``doors``: how often a map of the context, kept up by the rules, foretells the door that is tried.

            ``view``: how often it foretells every tile of a frame of the query, but for those never seen.
            """
            return self.judge(foretell(frames, self.n_doors, self.context_length), frames)

        def judge(self, imagined: Bytes, frames: Frames) -> dict[str, float]:
            """``doors`` and ``view`` as the oracle's, of imagined tiles (n, query_length, 5, 5)."""
            return scores(imagined, frames, self.context_length)

    def __init__(
        self,
        config: Config | None = None,
        *,
        observation: Literal["tiles", "pixels"] = "tiles",
        render_mode: str | None = None,
    ) -> None:
        self.config = MultiDoorsKeys.Config() if config is None else config
        super().__init__(self.config, observation, render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """A new episode from the environment's own generator, or from ``options["layout"]``."""
        super().reset(seed=seed)
        given = (options or {}).get("layout")
        self._layout = draw(self.config, self.np_random, 1) if given is None else Layout(*(part[:1] for part in given))
        self._carried = np.zeros(len(COLOURS), dtype=np.uint8)
        return self._begin(paint(self._layout)[0], start(self.config.n_doors), MIDDLE)

    def hidden_state(self) -> dict[str, Any]:
        """What the observation does not show, by the names of ``generate``'s keys."""
        at = columns(self.config.n_doors) + MARGIN
        doors, keys = self._known()[DOOR_ROW + MARGIN, at], self._known()[KEY_ROW + MARGIN, at]
        return {
            "position": (self._x, self._y),
            "heading": self._heading,
            "carried": tuple(self._carried.tolist()),
            "doors": tuple((doors >= FIRST_OPEN).tolist()),
            "door_colours": tuple(self._layout.door_colours[0].tolist()),
            "keys": tuple((keys != EMPTY).tolist()),
            "key_colours": tuple(self._layout.key_colours[0].tolist()),
        }

    def scripted_actions(self) -> Bytes:
        """The actions (episode_length - 1,) of the scripted policy from the start of this episode."""
        self._known()
        return _walk(self.config, self._layout).action[0, 1:]

    def _use(self, action: int, x: int, y: int) -> None:
        code = self._tile(x, y)
        if action == PICKUP and FIRST_KEY <= code < FIRST_KEY + len(COLOURS):
            self._carried[code - FIRST_KEY] += 1
            self._put(x, y, EMPTY)
        if action == TOGGLE and FIRST_LOCKED <= code < FIRST_OPEN and self._carried[code - FIRST_LOCKED]:
            self._carried[code - FIRST_LOCKED] -= 1
            self._put(x, y, code - FIRST_LOCKED + FIRST_OPEN)

    def _outcome(self) -> tuple[float, bool]:
        return 0.0, False


def generate(config: MultiDoorsKeys.Config, rng: np.random.Generator, n_episodes: int) -> Frames:
    """Scripted episodes of T = ``config.episode_length`` frames, as arrays (N, T, ...).

    ``tiles`` (5, 5) uint8; ``action`` uint8, index of the action that led to the frame (0 at the first); ``reward``
    float32, always 0; ``is_first``, ``is_last`` bool, ``is_terminal`` always False: episodes are cut off. For probing:
    ``position`` (2,) int32 (x, y), ``heading`` uint8, ``carried`` (4,) uint8 keys held of each colour, ``doors`` (n,)
    bool whether open, ``door_colours`` (n,) uint8, ``keys`` (n,) bool whether still lying, ``key_colours`` (n,) uint8;
    doors and keys from left to right. Cost: 52 + 4 n bytes per frame; no loop over frames.
    """
    return play(config, draw(config, rng, n_episodes))


def draw(config: MultiDoorsKeys.Config, rng: np.random.Generator, n_episodes: int) -> Layout:
    """The random part of some episodes."""
    n = config.n_doors
    door_colours = rng.integers(config.n_colours, size=(n_episodes, n), dtype=np.uint8)
    key_colours = rng.permuted(door_colours, axis=1)
    tour = rng.permuted(np.tile(np.arange(2 * n, dtype=np.uint8), (n_episodes, 1)), axis=1)
    key_order = rng.permuted(np.tile(np.arange(n, dtype=np.uint8), (n_episodes, 1)), axis=1)
    size = (n_episodes, n_choices(n, config.attempts, config.episode_length))
    return Layout(door_colours, key_colours, tour, key_order, rng.integers(1 << 16, size=size, dtype=np.uint16))


def paint(layout: Layout) -> Bytes:
    """Tile codes at the start without the agent, (N, 13, 4 n + 5): the grid in a margin of two walls."""
    N, n = layout.door_colours.shape
    grid = np.full((HEIGHT, width(n)), EMPTY, dtype=np.uint8)
    grid[[0, DOOR_ROW, OPENING, -1]], grid[:, [0, -1]] = WALL, WALL
    grid[[DOOR_ROW - 1, KEY_ROW], ::4] = WALL
    grid[OPENING, columns(n)] = EMPTY
    ground, inner = in_margin(grid, N)
    inner[:, DOOR_ROW, columns(n)] = layout.door_colours + FIRST_LOCKED
    inner[:, KEY_ROW, columns(n)] = layout.key_colours + FIRST_KEY
    return ground


def play(config: MultiDoorsKeys.Config, layout: Layout) -> Frames:
    """The scripted episodes of a layout, with the keys of ``generate``."""
    N, n = layout.door_colours.shape
    T = config.episode_length
    walked = _walk(config, layout)
    heading, x, y = _path(walked.action, start(n))
    time = np.arange(T)
    tiles = views(paint(layout), x, y)
    _update(tiles, x, y, walked.opened, walked.taken)
    tiles[:, :, MARGIN, MARGIN] = agent_code(tiles[:, :, MARGIN, MARGIN], heading)

    first, last = np.zeros((N, T), dtype=np.bool_), np.zeros((N, T), dtype=np.bool_)
    first[:, 0], last[:, -1] = True, True
    return {
        "tiles": tiles,
        "action": walked.action,
        "reward": np.zeros((N, T), dtype=np.float32),
        "is_first": first,
        "is_last": last,
        "is_terminal": np.zeros((N, T), dtype=np.bool_),
        "position": np.stack([x, y], axis=-1).astype(np.int32),
        "heading": heading,
        "carried": _counts(layout.key_colours, walked.taken, T) - _counts(layout.door_colours, walked.opened, T),
        "doors": walked.opened[:, None, :] <= time[:, None],
        "door_colours": np.repeat(layout.door_colours[:, None], T, axis=1),
        "keys": walked.taken[:, None, :] > time[:, None],
        "key_colours": np.repeat(layout.key_colours[:, None], T, axis=1),
    }


def _walk(config: MultiDoorsKeys.Config, layout: Layout) -> Walk:
    return walk(layout, config.context_length, config.query_length, config.attempts)


def _path(action: Bytes, column: int) -> tuple[Bytes, Ints, Ints]:
    """Heading, x and y (N, T) of scripted actions, which never walk into anything."""
    turns = (action == RIGHT).astype(np.int8) - (action == LEFT)
    turns[:, 0] = 0
    heading = turns.cumsum(axis=1, dtype=np.int64) % 4
    moved = action == FORWARD
    x = column + (STEPS[heading, 0] * moved).cumsum(axis=1)
    y = MIDDLE + (STEPS[heading, 1] * moved).cumsum(axis=1)
    return heading.astype(np.uint8), x, y


def _update(tiles: Bytes, x: Ints, y: Ints, opened: Ints, taken: Ints) -> None:
    """Open the doors and remove the keys that are seen (N, T, 5, 5) after they were opened or picked up.

    A view holds the row of the doors or that of the keys, never both, and one or two of their columns.
    """
    n = opened.shape[1]
    doors_seen = y < BOTTOM
    row = np.where(doors_seen, DOOR_ROW, KEY_ROW) - y + MARGIN
    time = np.arange(x.shape[1])
    changed = np.stack([opened, taken], axis=1)
    for which in (0, 1):
        offset = -x % 4 + 4 * which
        i = (x - MARGIN + offset) // 4
        inside = (offset < VIEW) & (i >= 0) & (i < n)
        episode, t = np.nonzero(inside)
        place = i[episode, t]
        is_door = doors_seen[episode, t]
        late = changed[episode, np.where(is_door, 0, 1), place] <= time[t]
        episode, t, is_door = episode[late], t[late], is_door[late]
        at = (episode, t, row[episode, t], offset[episode, t])
        tiles[at] = np.where(is_door, tiles[at] + (FIRST_OPEN - FIRST_LOCKED), EMPTY)


def _counts(colours: Bytes, since: Ints, T: int) -> Bytes:
    """How many things of each colour (N, T, 4) have happened by each frame; a frame of T: never."""
    N, n = colours.shape
    events = np.zeros((N, T + 1, len(COLOURS)), dtype=np.uint8)
    np.add.at(events, (np.repeat(np.arange(N), n), since.ravel(), colours.ravel()), 1)
    return events[:, :T].cumsum(axis=1, dtype=np.uint8)
