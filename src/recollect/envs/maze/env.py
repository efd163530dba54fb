"""Mazes to find coloured targets in, and their scripted walks for probing, after Memory Maze (arXiv 2210.13383)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.envs.base import Frames
from recollect.envs.maze.plans import RoomRules, draw_scenes
from recollect.envs.rooms import oracle
from recollect.envs.rooms.renderer import reduced
from recollect.envs.rooms.scene import DOME_RGB, SIZE, Bytes, Floats, Scene
from recollect.envs.rooms.walk import FirstPerson, FirstPersonConfig, marks, pictures, probes

SIZES = (9, 11, 13, 15)
CONTEXT, QUERY = 501, 500
BORDER = 2
"""Pixels of the frame in the current target's colour."""


class Episodes(NamedTuple):
    """Everything random about n episodes."""

    scene: Scene
    start: Floats
    """(n, 3) the first pose."""
    target: Bytes
    """(n,) the first target."""
    streams: npt.NDArray[np.uint64]
    """(n, 2) seeds of the policy, and of the targets that follow."""


class Script(NamedTuple):
    """What the policy does in n episodes of T frames."""

    states: Floats
    """(n, T, 5) see ``rooms.motion``."""
    actions: Bytes
    """(n, T) the action that led to the frame; 0 at the first."""
    targets: Bytes
    """(n, T) the target to be found."""
    rewards: npt.NDArray[np.float32]
    """(n, T) 1 where the target was touched, and has changed."""


class Maze(FirstPerson):
    """The environment, for stepping. Actions and motion as in ``rooms.motion``; pictures (64, 64, 3) uint8.

    Touching the current target is rewarded with 1, and another becomes the current one; other targets do nothing, and
    none is in the way. Only its length ends an episode. ``reset(options={"episodes": Episodes})`` plays the first
    episode given.
    """

    @dataclass(frozen=True)
    class Config(FirstPersonConfig, kind="maze"):
        """First-person mazes of rooms and corridors with coloured targets, for probing and for foreseeing views.

        ``border`` frames every picture in the current target's colour, as Memory Maze does for agents that look for
        it; ``noise`` is the share of random actions of the scripted policy. Raises ConfigError for a size other than
        9, 11, 13 or 15, or a noise outside 0..1.
        """

        size: int = 9
        border: bool = False
        noise: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.size not in SIZES:
                raise ConfigError(f"{self.kind}: size must be one of {', '.join(map(str, SIZES))}, got {self.size}")
            if not 0 <= self.noise <= 1:
                raise ConfigError(f"{self.kind}: noise must lie in 0..1, got {self.noise}")

        @property
        def n_targets(self) -> int:
            """3 for the smallest maze, one more for every size above."""
            return 3 + SIZES.index(self.size)

        @property
        def rules(self) -> RoomRules:
            """At most six rooms of sides 3 and 5; in the largest maze nine of side 3."""
            return RoomRules(9, (3,)) if self.size == 15 else RoomRules(6, (3, 5))

        @property
        def context_length(self) -> int:
            """The first half: probing scores are averages over the second."""
            return CONTEXT

        @property
        def query_length(self) -> int:
            """The second half."""
            return QUERY

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> Maze:  # noqa: ARG002 (always are)
            """The environment, for stepping."""
            return Maze(self, render_mode=render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            """Scripted episodes: ``image``, ``action``, ``reward``, the keys of ``probes``, and ``target_pos`` (2,),
            ``target_vec`` (2,), ``target_color`` (3,) float32 of the current target.
            """
            return play(self, draw(self, rng, n_episodes))

        def oracle(self, frames: Frames) -> dict[str, float]:
            """``view`` and ``seen`` of ``rooms.oracle.view``, without the border."""
            return oracle.view(frames, self.context_length, margin=-(-BORDER * self.side // SIZE) if self.border else 0)

    name: ClassVar[str] = "maze"

    def __init__(self, config: Config | None = None, *, render_mode: str | None = None) -> None:
        self.config = Maze.Config() if config is None else config
        super().__init__(self.config, render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """A new episode from the environment's own generator, or from ``options["episodes"]``."""
        super().reset(seed=seed)
        given: Episodes | None = (options or {}).get("episodes")
        self._episode = _first(draw(self.config, self.np_random, 1) if given is None else given)
        self._target, self._draws = int(self._episode.target[0]), self._episode.streams[0, 1:].copy()
        self._begin(self._episode.scene, self._episode.start[0])
        return self._seen(), {}

    def step(self, action: np.int64 | int) -> tuple[Bytes, float, bool, bool, dict[str, Any]]:
        """One action. Raises ResetNeeded after the end of an episode, InvalidAction outside 0..5."""
        from recollect.envs.maze.policy import touch
        from recollect.envs.rooms.compiled import plain

        truncated = self._move(action)
        domes = self._episode.scene.domes[0]
        target = int(touch(self._state, plain(domes, np.float32), self._target, self._draws))
        reward, self._target = float(target != self._target), target
        return self._seen(), reward, False, truncated, {}

    def hidden_state(self) -> dict[str, Any]:
        """The keys of ``probes``, and those of the current target."""
        found = super().hidden_state()
        return found | {name: found[f"targets_{name[7:]}"][self._target] for name in _CURRENT}

    def scripted_actions(self) -> Bytes:
        """The actions (episode_length - 1,) of the scripted policy from the start of this episode."""
        self._world("scripted_actions")
        return script(self.config, self._episode).actions[0, 1:]

    def _picture(self) -> Bytes:
        image = super()._picture()
        if self.config.border:
            _frame(image, DOME_RGB[self._episode.scene.colours[0, self._target]])
        return image


_CURRENT = ("target_pos", "target_vec", "target_color")


def draw(config: Maze.Config, rng: np.random.Generator, n: int) -> Episodes:
    """The random part of n episodes."""
    scene, start = draw_scenes(rng, n, config.size, config.rules, config.n_targets)
    target = rng.integers(config.n_targets, size=n).astype(np.uint8)
    return Episodes(scene, start, target, rng.integers(2**63, size=(n, 2)).astype(np.uint64))


def script(config: Maze.Config, episodes: Episodes, *, threads: int = 1) -> Script:
    """What the policy does; about half a microsecond a frame."""
    from recollect.envs.maze.policy import play_maze
    from recollect.envs.rooms.compiled import over_rows, plain

    n, T = len(episodes.start), config.episode_length
    found = Script(
        np.zeros((n, T, 5)),
        np.zeros((n, T), dtype=np.uint8),
        np.zeros((n, T), dtype=np.uint8),
        np.zeros((n, T), dtype=np.float32),
    )
    found.states[:, 0, :3], found.targets[:, 0] = episodes.start, episodes.target
    given = (
        episodes.streams.astype(np.uint64),
        config.noise,
        plain(episodes.scene.grid, np.uint8),
        plain(episodes.scene.domes, np.float32),
    )
    over_rows(n, threads, lambda begin, end: play_maze(begin, end, *given, *found))
    return found


def play(config: Maze.Config, episodes: Episodes) -> Frames:
    """The scripted episodes, with the keys of ``generate``."""
    n, T = len(episodes.start), config.episode_length
    states, actions, targets, rewards = script(config, episodes)
    image, found = pictures(episodes.scene, states), probes(episodes.scene, states)
    rows, steps = np.arange(n)[:, None], np.arange(T)
    current = {name: found[f"targets_{name[7:]}"][rows, steps, targets] for name in _CURRENT}
    if config.border:
        _frame(image, current["target_color"])
    return {
        "image": reduced(image, config.side),
        "action": actions,
        "reward": rewards,
        **marks(n, T),
        **found,
        **current,
    }


def _frame(image: Bytes, rgb: npt.NDArray[np.float32]) -> None:
    """Paint the border of pictures (..., 64, 64, 3) in colours (..., 3), in place."""
    colour = (rgb * (255 * 0.7)).astype(np.uint8)[..., None, :]
    for k in (*range(BORDER), *range(-BORDER, 0)):
        image[..., k, :, :] = colour
        image[..., :, k, :] = colour


def _first(episodes: Episodes) -> Episodes:
    one = slice(0, 1)
    return Episodes(episodes.scene.take(one), episodes.start[one], episodes.target[one], episodes.streams[one])
