"""What the rooms and the mazes share: walking about in a scene, and the arrays that say where one is."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from recollect.core.errors import ConfigError
from recollect.envs.base import EnvConfig, Frames, MemoryEnv, Observation
from recollect.envs.rooms.renderer import reduced, render
from recollect.envs.rooms.scene import DOME_RGB, SIZE, Bytes, Floats, Scene, free_cells, seen_from

ACTIONS = ("noop", "forward", "left", "right", "forward_left", "forward_right")
"""As in ``motion``, which is compiled and so not imported before it is used."""


CONSTANT = ("maze_layout", "cells", "targets_pos", "targets_color")
"""Those of ``probes`` that stay as they are within an episode."""
PROBED = ("maze_layout", "agent_pos", "agent_dir", "targets_vec")
"""Those of ``probes`` that are asked of a model."""


def probes(scene: Scene, states: Floats) -> Frames:
    """What probes may ask of n episodes of T frames, given states (n, T, 5); Memory Maze's names where it has one.

    ``maze_layout`` (h, w) uint8, ``cells`` (h + 2, w + 2) uint8, the codes of ``scene`` with the outer walls, lowest y
    first both; ``agent_pos`` (2,), ``agent_dir`` (2,), ``targets_pos`` (S, 2), ``targets_vec`` (S, 2) to the right and
    ahead, ``targets_color`` (S, 3) in 0..1, all float32 and in cells; ``heading`` float64 in radians.
    """
    T = states.shape[1]

    def always(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.repeat(array[:, None], T, axis=1)

    position, heading = states[..., :2], states[..., 2]
    targets = always(scene.domes)
    return {
        "maze_layout": always(free_cells(scene.grid)),
        "cells": always(scene.grid),
        "agent_pos": position.astype(np.float32),
        "agent_dir": np.stack([np.cos(heading), np.sin(heading)], axis=-1).astype(np.float32),
        "heading": heading.copy(),
        "targets_pos": targets,
        "targets_vec": seen_from(targets, position, heading),
        "targets_color": always(DOME_RGB[scene.colours]),
    }


def pictures(scene: Scene, states: Floats) -> Bytes:
    """The frames (n, T, 64, 64, 3) of states (n, T, 5)."""
    n, T = states.shape[:2]
    poses = states[..., :3].reshape(n * T, 3)
    return render(scene, poses, np.repeat(np.arange(n), T)).reshape(n, T, SIZE, SIZE, 3)


def marks(n: int, T: int) -> Frames:
    """``is_first``, ``is_last``, ``is_terminal`` of n episodes that are cut off after T frames."""
    first, last = np.zeros((n, T), dtype=np.bool_), np.zeros((n, T), dtype=np.bool_)
    first[:, 0], last[:, -1] = True, True
    return {"is_first": first, "is_last": last, "is_terminal": np.zeros((n, T), dtype=np.bool_)}


@dataclass(frozen=True, kw_only=True)
class FirstPersonConfig(EnvConfig, ABC):
    """Base of the configs of ``FirstPerson``. Raises ConfigError for a side that does not divide 64."""

    actions: ClassVar[tuple[str, ...]] = ACTIONS
    observation: ClassVar[Observation] = "image"
    block_episodes: ClassVar[int] = 8
    constant: ClassVar[tuple[str, ...]] = CONSTANT
    probed: ClassVar[tuple[str, ...]] = PROBED

    side: int = SIZE
    """Of the pictures that are seen, in pixels: those that are rendered, averaged over squares."""

    def __post_init__(self) -> None:
        if not 1 <= self.side <= SIZE or SIZE % self.side:
            raise ConfigError(f"{self.kind}: side must divide {SIZE}, got {self.side}")

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """side x side x 3."""
        return (self.side, self.side, 3)


class FirstPerson(MemoryEnv):
    """Stepping through one scene. Subclasses draw it, and say what a step does beside moving."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (gymnasium's own form)
    name: ClassVar[str]

    def __init__(self, config: FirstPersonConfig, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(len(ACTIONS))
        self.observation_space = spaces.Box(0, 255, config.observation_shape, np.uint8)
        self._length, self._side = config.episode_length, config.side
        self._scene: Scene | None = None
        self._over = True

    def _begin(self, scene: Scene, start: Floats) -> None:
        """Stand at the pose ``start`` (3,) of a scene of one world."""
        self._scene, self._steps, self._over = scene, 0, False
        self._state = np.zeros(5)
        self._state[:3] = start

    def _move(self, action: np.int64 | int) -> bool:
        """One action; whether the episode is over. Raises ResetNeeded after its end, InvalidAction outside 0..5."""
        from recollect.envs.rooms.compiled import plain
        from recollect.envs.rooms.motion import replay

        if self._over or self._scene is None:
            raise gymnasium.error.ResetNeeded(f"{self.name}: call reset() before step()")
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction(
                f"{self.name}: action must lie in 0..{len(ACTIONS) - 1}, got {action!r}"
            )
        states = np.stack([self._state, self._state])
        replay(states, np.array([0, action], dtype=np.uint8), plain(self._scene.grid[0], np.uint8))
        self._state = states[1]
        self._steps += 1
        self._over = self._steps >= self._length - 1
        return self._over

    def _world(self, wanted: str) -> Scene:
        if self._scene is None:
            raise gymnasium.error.ResetNeeded(f"{self.name}: call reset() before {wanted}()")
        return self._scene

    def _seen(self) -> Bytes:
        return reduced(self._picture(), self._side)

    def _picture(self) -> Bytes:
        return pictures(self._world("render"), self._state[None, None])[0, 0]

    def render(self) -> Bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The agent's view (64, 64, 3) in mode ``rgb_array``, whatever ``side``; None without a render mode."""
        return None if self.render_mode is None else self._picture()

    def hidden_state(self) -> dict[str, Any]:
        """Where the agent is and what is where: the keys of ``probes``."""
        found = probes(self._world("hidden_state"), self._state[None, None])
        return {key: array[0, 0] for key, array in found.items()}
