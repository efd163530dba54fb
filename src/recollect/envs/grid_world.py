"""What the grid worlds share: walking on a grid of tile codes, and a view of 5 x 5 tiles around the agent.

The view does not turn with the agent and nothing hides what is behind a wall; beyond the grid there are walls. So a
grid is kept in a margin of two walls, and the view from (x, y) is its slice [y : y + 5, x : x + 5].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from recollect.core.errors import ConfigError
from recollect.envs.base import EnvConfig, MemoryEnv, Observation
from recollect.envs.tiles import (
    EMPTY,
    FIRST_COLOUR,
    FIRST_KEY,
    FIRST_OPEN,
    N_CODES,
    TILE_PIXELS,
    WALL,
    Bytes,
    agent_code,
    render,
    text,
)

VIEW, MARGIN = 5, 2
LEFT, RIGHT, FORWARD = range(3)
STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
"""(x, y) of one step forward, by heading."""

WALKABLE = np.isin(np.arange(N_CODES), [EMPTY, *range(FIRST_COLOUR, FIRST_COLOUR + 4), *range(FIRST_OPEN, FIRST_KEY)])
"""By tile code: whether one can stand there."""
WALKABLE.setflags(write=False)


@dataclass(frozen=True)
class GridConfig(EnvConfig, ABC):
    """Base of the grid worlds' configs."""

    observation: ClassVar[Observation] = "tiles"
    n_codes: ClassVar[int] = N_CODES

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """5 x 5 tiles."""
        return (VIEW, VIEW)


class GridWorld(MemoryEnv, ABC):
    """Base of the environments: turning, walking, looking, and being cut off after twice a scripted episode.

    Observations: tile codes (5, 5) uint8 with ``observation="tiles"``, pictures (40, 40, 3) uint8 with ``"pixels"``.
    Render modes: ``rgb_array``, the view as a picture; ``ansi``, as text with colours. A subclass's ``reset`` ends in
    ``_begin``; it says what further actions do, and what a position is worth.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own form)
    observation_kinds: ClassVar[tuple[str, ...]] = ("tiles", "pixels")

    def __init__(self, config: GridConfig, observation: Literal["tiles", "pixels"], render_mode: str | None) -> None:
        if observation not in self.observation_kinds:
            raise ConfigError(f"{config.kind}: observation is 'tiles' or 'pixels', got '{observation}'")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"{config.kind}: render_mode is 'ansi' or 'rgb_array', got '{render_mode}'")
        self._config = config
        self.observation = observation
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(config.n_actions)
        self.observation_space: spaces.Space[Any]
        if observation == "tiles":
            self.observation_space = spaces.MultiDiscrete(np.full((VIEW, VIEW), config.n_codes), dtype=np.uint8)
        else:
            side = VIEW * TILE_PIXELS
            self.observation_space = spaces.Box(0, 255, (side, side, 3), np.uint8)
        self._ground: Bytes | None = None
        self._over = True

    def step(self, action: np.int64 | int) -> tuple[Bytes, float, bool, bool, dict[str, Any]]:
        """One action. Raises ResetNeeded after the end of an episode, InvalidAction for one that there is not."""
        config = self._config
        if self._over:
            raise gymnasium.error.ResetNeeded(f"{config.kind}: call reset() before step()")
        if not self.action_space.contains(action):
            named = ", ".join(f"{i} {name}" for i, name in enumerate(config.actions))
            raise gymnasium.error.InvalidAction(f"{config.kind}: action must be one of {named}, got {action!r}")
        ahead = self._ahead()
        if action == FORWARD:
            if WALKABLE[self._tile(*ahead)]:
                self._x, self._y = ahead
        elif action in (LEFT, RIGHT):
            self._heading = (self._heading + (1 if action == RIGHT else -1)) % 4
        else:
            self._use(int(action), *ahead)
        self._steps += 1
        reward, terminated = self._outcome()
        truncated = not terminated and self._steps >= 2 * config.episode_length
        self._over = terminated or truncated
        return self._observe(), reward, terminated, truncated, {}

    def render(self) -> Bytes | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The agent's view: a picture (40, 40, 3), text, or None without a render mode."""
        if self.render_mode is None:
            return None
        return text(self._view()) if self.render_mode == "ansi" else render(self._view())

    def grid(self) -> Bytes:
        """Codes (height, width) of the whole grid as it is now, with the agent: what nobody inside sees."""
        grid = self._known()[MARGIN:-MARGIN, MARGIN:-MARGIN].copy()
        grid[self._y, self._x] = agent_code(grid[self._y, self._x], self._heading)
        return grid

    @abstractmethod
    def _use(self, action: int, x: int, y: int) -> None:
        """An action above FORWARD, towards the tile (x, y) ahead."""

    @abstractmethod
    def _outcome(self) -> tuple[float, bool]:
        """Reward and end, after every action."""

    def _begin(self, ground: Bytes, x: int, y: int) -> tuple[Bytes, dict[str, Any]]:
        """Start an episode on a grid in its margin, facing right."""
        self._ground, self._x, self._y, self._heading, self._steps, self._over = ground, x, y, 0, 0, False
        return self._observe(), {}

    def _known(self) -> Bytes:
        if self._ground is None:
            raise gymnasium.error.ResetNeeded(f"{self._config.kind}: call reset() first")
        return self._ground

    def _tile(self, x: int, y: int) -> int:
        return int(self._known()[y + MARGIN, x + MARGIN])

    def _put(self, x: int, y: int, code: int) -> None:
        self._known()[y + MARGIN, x + MARGIN] = code

    def _ahead(self) -> tuple[int, int]:
        dx, dy = STEPS[self._heading].tolist()
        return self._x + dx, self._y + dy

    def _view(self) -> Bytes:
        view = self._known()[self._y : self._y + VIEW, self._x : self._x + VIEW].copy()
        view[MARGIN, MARGIN] = agent_code(view[MARGIN, MARGIN], self._heading)
        return view

    def _observe(self) -> Bytes:
        return self._view() if self.observation == "tiles" else render(self._view())


def in_margin(grid: Bytes, n: int) -> tuple[Bytes, Bytes]:
    """n copies (n, height + 4, width + 4) of a grid in its margin of walls, and the view of them without the margin."""
    ground = np.full((n, grid.shape[0] + 2 * MARGIN, grid.shape[1] + 2 * MARGIN), WALL, dtype=np.uint8)
    inner = ground[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner[:] = grid
    return ground, inner


def views(ground: Bytes, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> Bytes:
    """Codes (n, T, 5, 5) seen from x and y (n, T), or the same (T,) for all, without the agent.

    Cost: one lookup of 25 tiles per frame.
    """
    n, height, width = ground.shape
    window = np.arange(VIEW, dtype=np.int64)
    around = (window[:, None] * width + window).astype(np.int32)
    corner = (y * width + x).astype(np.int32)[..., None, None]
    flat = ground.reshape(n, height * width)
    if x.ndim == 1:
        return flat.take(corner + around, axis=1)
    seen = np.empty((*x.shape, VIEW, VIEW), dtype=np.uint8)
    for i in range(n):
        flat[i].take(corner[i] + around, out=seen[i])
    return seen
