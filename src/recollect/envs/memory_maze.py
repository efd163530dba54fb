"""The real Memory Maze (Pasukonis et al., arXiv 2210.13383) behind gymnasium: MuJoCo's pictures, extra ``mujoco``.

A maze of ``size`` x ``size`` cells with coloured balls on the floor. The border of the picture has the colour of the
ball to find; touching it gives reward 1 and another colour. 4 steps a second, 64 x 64 pixels, first person.

The package ``memory_maze`` imports the old ``gym`` only to register itself there; it is shown gymnasium instead. Most
of its time went into a Python loop over contacts, which is done on whole arrays here; the pictures are the same.

The scripted episode is a noisy walk: to a random free cell along a shortest path, then to another, with random actions
in between, as the authors describe their offline data. Their own policy was not published, so episodes are like theirs
but not theirs (those are imported: ``recollect data import``). The **context** is the first half of its steps, the
**query** the rest, where the authors measure what is remembered.
"""

from __future__ import annotations

import importlib
import sys
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from recollect.core.errors import ConfigError, described
from recollect.envs.base import EnvConfig, Frames, MemoryEnv, Observation
from recollect.envs.rooms.walk import ACTIONS, PROBED
from recollect.envs.tiles import Bytes

PIXELS = 64
SIZES: dict[int, tuple[int, int]] = {9: (3, 1000), 11: (4, 2000), 13: (5, 3000), 15: (6, 4000)}
"""Size -> balls, and steps after which the game ends."""
PROBES = (
    "maze_layout",
    "agent_pos",
    "agent_dir",
    "targets_pos",
    "targets_vec",
    "target_pos",
    "target_vec",
    "target_color",
)
"""What Memory Maze's own trajectories hold beside the pictures, under the same names."""
NOOP, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(6)
NOISE = 0.1
"""Probability of a random action."""


class MemoryMaze(MemoryEnv):
    """The environment, for stepping. One of them renders at a time in a process.

    Actions: 0 none, 1 forward, 2 left, 3 right, 4 forward and left, 5 forward and right. Observations: pictures
    (64, 64, 3) uint8. Never terminated; truncated after the number of steps of ``SIZES``. A reset makes a maze from the
    environment's own generator, which takes seconds.
    """

    @dataclass(frozen=True)
    class Config(EnvConfig, kind="memory-maze"):
        """Find balls by colour in a maze: the real Memory Maze, rendered by MuJoCo (extra ``mujoco``).

        Raises ConfigError for another size, or ``steps`` of a scripted episode outside those of the game.
        """

        actions: ClassVar[tuple[str, ...]] = ACTIONS
        observation: ClassVar[Observation] = "image"
        block_episodes: ClassVar[int] = 1
        constant: ClassVar[tuple[str, ...]] = ("maze_layout",)
        probed: ClassVar[tuple[str, ...]] = PROBED

        size: int = 9
        steps: int = 1000

        def __post_init__(self) -> None:
            if self.size not in SIZES:
                raise ConfigError(f"{self.kind}: size is {', '.join(map(str, SIZES))}, got {self.size}")
            if not 1 <= self.steps <= SIZES[self.size][1]:
                raise ConfigError(f"{self.kind}: steps must lie in 1..{SIZES[self.size][1]}, got {self.steps}")

        @property
        def n_targets(self) -> int:
            """Balls in the maze."""
            return SIZES[self.size][0]

        @property
        def context_length(self) -> int:
            """The first half of the steps."""
            return (self.steps + 1) // 2

        @property
        def query_length(self) -> int:
            """The frames after them."""
            return self.steps + 1 - self.context_length

        @property
        def observation_shape(self) -> tuple[int, ...]:
            """64 x 64 pixels."""
            return (PIXELS, PIXELS, 3)

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> MemoryMaze:
            """The environment, for stepping. Raises ConfigError without the extra ``mujoco``."""
            del pixels
            return MemoryMaze(self, render_mode=render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            """Scripted episodes: ``image`` (64, 64, 3) uint8, and the keys of ``PROBES``, float32 (the layout uint8).

            Cost: about 30 seconds for an episode of 1000 steps. Raises ConfigError without the extra ``mujoco``.
            """
            env = self.build()
            episodes = [_episode(env, int(rng.integers(2**31))) for _ in range(n_episodes)]
            env.close()
            return {key: np.stack([episode[key] for episode in episodes]) for key in episodes[0]}

        def oracle(self, frames: Frames) -> dict[str, float]:
            """No scores: no solver reads these pictures. The same mazes in our own renderer have one."""
            del frames
            return {}

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, config: Config | None = None, *, render_mode: str | None = None) -> None:
        self.config = MemoryMaze.Config() if config is None else config
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(self.config.n_actions)
        self.observation_space = spaces.Box(0, 255, self.config.observation_shape, np.uint8)
        self._tasks = package()
        self._game: Any = None
        self._seen: dict[str, npt.NDArray[Any]] = {}
        self._maze_seed, self._over = 0, True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """A new maze. Raises ConfigError where MuJoCo cannot render."""
        super().reset(seed=seed, options=options)
        self._maze_seed = int(self.np_random.integers(1, 2**31))
        self._begin()
        return self._observe(), {}

    def step(self, action: np.int64 | int) -> tuple[Bytes, float, bool, bool, dict[str, Any]]:
        """One action, a quarter of a second. Raises ResetNeeded after the end, InvalidAction outside 0..5."""
        if self._over:
            raise gymnasium.error.ResetNeeded("memory-maze: call reset() before step()")
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction(f"memory-maze: action must lie in 0..5, got {action!r}")
        step = self._game.step(int(action))
        self._seen, self._over = step.observation, bool(step.last())
        return self._observe(), float(step.reward), False, self._over, {}

    def render(self) -> Bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What the agent sees (64, 64, 3) in mode ``rgb_array``; None without a render mode."""
        return None if self.render_mode is None else self._observe()

    def hidden_state(self) -> dict[str, Any]:
        """What the picture does not show, by the names of ``PROBES``."""
        if not self._seen:
            raise gymnasium.error.ResetNeeded("memory-maze: call reset() before hidden_state()")
        kept = {key: np.asarray(self._seen[key]) for key in PROBES}
        return {key: value.astype(np.uint8 if key == "maze_layout" else np.float32) for key, value in kept.items()}

    def scripted_actions(self) -> Bytes:
        """The actions (steps,) of the scripted policy from the start of this maze.

        The policy looks where it is, so this walks them, in a twin of the game: it takes as long as the episode.
        """
        if not self._seen:
            raise gymnasium.error.ResetNeeded("memory-maze: call reset() before scripted_actions()")
        twin = MemoryMaze(self.config)
        twin._maze_seed = self._maze_seed
        twin._begin()
        walk = twin.walk()
        actions = np.zeros(self.config.steps, dtype=np.uint8)
        for t in range(self.config.steps):
            actions[t] = walk.action(twin.hidden_state())
            twin.step(int(actions[t]))
        twin.close()
        return actions

    def walk(self) -> _Walk:
        """The scripted policy of this maze, at its beginning."""
        return _Walk(self._maze_seed)

    def close(self) -> None:
        """Free the renderer."""
        if self._game is not None:
            self._game.close()
            self._game = None
        self._over = True

    def _begin(self) -> None:
        """The maze of ``_maze_seed``: the package draws it when the game is made, so each reset makes a game."""
        if self._game is not None:
            self._game.close()
        make = getattr(self._tasks, f"memory_maze_{self.config.size}x{self.config.size}")
        try:
            self._game = make(seed=self._maze_seed, global_observables=True)
            self._seen = self._game.reset().observation
        except Exception as error:
            self._game = None
            raise ConfigError(_no_renderer(error)) from error
        self._over = False

    def _observe(self) -> Bytes:
        return np.array(self._seen["image"])


class _Walk:
    """The scripted policy: along shortest paths to random cells, now and then a random action."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._goal: tuple[int, int] | None = None

    def action(self, state: dict[str, Any]) -> int:
        """What to do next, by where the agent is."""
        free, at = state["maze_layout"], state["agent_pos"]
        cell = _cell(at, free)
        while self._goal is None or self._goal == cell:
            y, x = np.argwhere(free)[self._rng.integers(int(free.sum()))].tolist()
            self._goal = (x, y)
        if self._rng.random() < NOISE:
            return int(self._rng.integers(6))
        step = towards(free, cell, self._goal)
        if step is None:  # two rooms without a way between them
            self._goal = None
            return FORWARD
        want = np.array(step) + 0.5 - at
        ahead = float(want @ state["agent_dir"])
        aside = float(state["agent_dir"][0] * want[1] - state["agent_dir"][1] * want[0])  # to the left
        angle = np.arctan2(aside, ahead)
        if abs(angle) < np.pi / 12:
            return FORWARD
        if abs(angle) < np.pi / 4:
            return FORWARD_LEFT if angle > 0 else FORWARD_RIGHT
        return LEFT if angle > 0 else RIGHT


def towards(free: Bytes, start: tuple[int, int], goal: tuple[int, int]) -> tuple[int, int] | None:
    """The cell (x, y) after ``start`` on a shortest path to ``goal`` through free cells; None where there is none."""
    height, width = free.shape
    after: dict[tuple[int, int], tuple[int, int]] = {goal: goal}
    waiting = deque([goal])
    while waiting:
        x, y = waiting.popleft()
        if (x, y) == start:
            return after[start]
        for near in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)):
            if 0 <= near[0] < width and 0 <= near[1] < height and free[near[1], near[0]] and near not in after:
                after[near] = (x, y)
                waiting.append(near)
    return None


def _cell(at: npt.NDArray[Any], free: Bytes) -> tuple[int, int]:
    """The cell under a position: the nearest free one, should the ball lean into a wall."""
    y, x = np.argwhere(free).T
    nearest = int(((x + 0.5 - at[0]) ** 2 + (y + 0.5 - at[1]) ** 2).argmin())
    return int(x[nearest]), int(y[nearest])


def _episode(env: MemoryMaze, seed: int) -> Frames:
    """One scripted episode, arrays (T, ...)."""
    image, _ = env.reset(seed=seed)
    walk, action, reward = env.walk(), 0, 0.0
    rows: list[dict[str, Any]] = []
    for t in range(env.config.episode_length):
        if t:
            action = walk.action(rows[-1])
            image, reward, *_ = env.step(action)
        rows.append({"image": image, "action": np.uint8(action), "reward": np.float32(reward), **env.hidden_state()})
    frames: Frames = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    for key in ("is_first", "is_last", "is_terminal"):
        frames[key] = np.zeros(len(rows), dtype=np.bool_)
    frames["is_first"][0] = frames["is_last"][-1] = True
    return frames


@cache
def package() -> Any:
    """The module ``memory_maze.tasks``, with the quick contact check. Raises ConfigError where it is not installed."""
    try:
        with _gymnasium_as_gym():
            tasks = importlib.import_module("memory_maze.tasks")
            maze: Any = importlib.import_module("memory_maze.maze")
        spheres = importlib.import_module("dm_control.locomotion.props.target_sphere")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"memory-maze needs MuJoCo and its package ({error.name} is missing): pip install 'recollect[mujoco]'"
        ) from None
    except Exception as error:  # whatever looking for a renderer raises, which differs from system to system
        raise ConfigError(_no_renderer(error)) from error
    maze.target_sphere = SimpleNamespace(TargetSphere=quick(spheres.TargetSphere))
    return tasks


def _no_renderer(error: Exception) -> str:
    return f"memory-maze: MuJoCo cannot render ({described(error)}); install EGL, or set MUJOCO_GL=osmesa or glfw"


def quick(sphere: Any) -> Any:
    """``TargetSphere`` with its loop over contacts done on arrays: what touches it, touches it."""

    class QuickTargetSphere(sphere):
        """Activated by touch, like its base."""

        def _update_activation(self, physics: Any) -> None:
            if not self._activated and touched(physics.data.contact, self._geom_id, self._specific_collision_geom_ids):
                self._activated = True
                physics.bind(self._material).rgba[-1] = 0

    return QuickTargetSphere


def touched(contacts: Any, geom: int, only: Any = None) -> bool:
    """Whether a geom takes part in a contact; with ``only`` in one that one of those takes part in as well."""
    pairs = np.stack([contacts.geom1, contacts.geom2])
    ours = (pairs == geom).any(axis=0)
    return bool((ours & np.isin(pairs, list(only)).any(axis=0)).any() if only else ours.any())


@contextmanager
def _gymnasium_as_gym() -> Generator[None]:
    """Importing ``gym`` gives gymnasium, whose registry stays as it is."""
    registration = ModuleType("gym.envs.registration")
    registration.register = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue]
    shown = {"gym": gymnasium, "gym.spaces": spaces, "gym.envs": gymnasium.envs, "gym.envs.registration": registration}
    before = {name: sys.modules.get(name) for name in shown}
    sys.modules.update(shown)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
