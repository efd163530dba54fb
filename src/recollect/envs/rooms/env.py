"""Two, Four and Ten Rooms: walk around a ring of rooms once, then imagine the second round (arXiv 2307.02064)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, nearest
from recollect.envs.base import Frames
from recollect.envs.rooms import oracle
from recollect.envs.rooms.layouts import Layout, RoomsName, draw_scenes, draw_starts, layout, room_of
from recollect.envs.rooms.renderer import reduced
from recollect.envs.rooms.scene import Bytes, Floats, Scene
from recollect.envs.rooms.schedules import SCHEDULES, Schedule
from recollect.envs.rooms.walk import FirstPerson, FirstPersonConfig, marks, pictures, probes


class Episodes(NamedTuple):
    """Everything random about n episodes."""

    scene: Scene
    start: Floats
    """(n, 3) the first pose."""
    stream: npt.NDArray[np.uint64]
    """(n,) seeds of the policy."""
    copied: npt.NDArray[np.int64]
    """(n,) the frame a teleport leads back to; 0 without teleports."""


class Script(NamedTuple):
    """What the policy does in n episodes of T frames with K switches."""

    states: Floats
    """(n, T, 5) see ``motion``."""
    actions: Bytes
    """(n, T) the action that led to the frame; 0 at the first."""
    switches: npt.NDArray[np.int64]
    """(n, K) the last step of exploring a room."""
    attempts: npt.NDArray[np.int64]
    """(n,) how often an episode was begun until the policy got through."""


class Rooms(FirstPerson):
    """The environment, for stepping. Actions and motion: see ``motion``. Pictures (64, 64, 3) uint8.

    Nothing is rewarded, and nothing ends an episode but its length. In the teleport variants the step that completes
    the context leads, whatever the action, back to an earlier moment, its speed included: the same actions then show
    the same frames. ``reset(options={"episodes": Episodes})`` plays the first episode given.
    """

    @dataclass(frozen=True)
    class Config(FirstPersonConfig, kind="rooms"):
        """First-person rooms in a ring: see them all in one round, then foresee the next; or recall after a teleport.

        ``query`` asks for longer episodes: so many frames after the same context, the policy going on from room to room
        as often as in the published query (``Schedule.lasting``). The paper's sets for horizons beyond those trained on
        are ``Config("two", query=700)`` and ``Config("four", query=1500)``: 1,000 and 2,000 steps.

        Raises ConfigError for rooms other than "two", "four" and "ten", for a query shorter than the published one, and
        for one after a teleport, which repeats a walk that is only so long.
        """

        rooms: RoomsName = "two"
        teleport: bool = False
        query: int | None = None
        """Frames after the context; None: the published number."""

        def __post_init__(self) -> None:
            super().__post_init__()
            names = {name for name, _ in SCHEDULES}
            if self.rooms not in names:
                raise ConfigError(f"{self.kind}: no plan of '{self.rooms}' rooms{nearest(str(self.rooms), names)}")
            if self.query is None:
                return
            if self.teleport:
                raise ConfigError(f"{self.kind}: a teleport repeats the published query; leave out query or teleport")
            shortest = SCHEDULES[self.rooms, False].query
            if self.query < shortest:
                raise ConfigError(f"{self.kind}: query must be at least the published {shortest}, got {self.query}")

        @property
        def layout(self) -> Layout:
            """The plan."""
            return layout(self.rooms)

        @property
        def schedule(self) -> Schedule:
            """When the policy does what."""
            published = SCHEDULES[self.rooms, self.teleport]
            return published if self.query is None else published.lasting(self.query)

        @property
        def context_length(self) -> int:
            """Frames of the first round, or up to the one teleported to."""
            return self.schedule.context

        @property
        def query_length(self) -> int:
            """Frames after that."""
            return self.schedule.query

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> Rooms:  # noqa: ARG002 (always are)
            """The environment, for stepping."""
            return Rooms(self, render_mode=render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            """Scripted episodes: ``image``, ``action``, ``reward`` (0), the keys of ``probes``, and ``room`` uint8."""
            return play(self, draw(self, rng, n_episodes))

        def oracle(self, frames: Frames) -> dict[str, float]:
            """``view`` and ``seen`` of ``oracle.view``."""
            return oracle.view(frames, self.context_length, teleports=self.teleport)

    name: ClassVar[str] = "rooms"

    def __init__(self, config: Config | None = None, *, render_mode: str | None = None) -> None:
        self.config = Rooms.Config() if config is None else config
        super().__init__(self.config, render_mode)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Bytes, dict[str, Any]]:
        """A new episode from the environment's own generator, or from ``options["episodes"]``."""
        super().reset(seed=seed)
        given: Episodes | None = (options or {}).get("episodes")
        self._episode = _first(draw(self.config, self.np_random, 1) if given is None else given)
        self._begin(self._episode.scene, self._episode.start[0])
        self._room = int(room_of(self.config.layout, self._state[None, :2])[0])
        self._past = [(self._state, self._room)]
        return self._seen(), {}

    def step(self, action: np.int64 | int) -> tuple[Bytes, float, bool, bool, dict[str, Any]]:
        """One action. Raises ResetNeeded after the end of an episode, InvalidAction outside 0..5."""
        truncated = self._move(action)
        self._room = int(room_of(self.config.layout, self._state[None, :2], self._room)[0])
        if self.config.teleport and self._steps == self.config.context_length - 1:
            self._state, self._room = self._past[int(self._episode.copied[0])]
        self._past.append((self._state, self._room))
        return self._seen(), 0.0, False, truncated, {}

    def hidden_state(self) -> dict[str, Any]:
        """The keys of ``probes``, and ``room``."""
        return super().hidden_state() | {"room": self._room}

    def scripted_actions(self) -> Bytes:
        """The actions (episode_length - 1,) of the scripted policy from the start of this episode."""
        self._world("scripted_actions")
        return script(self.config, self._episode).actions[0, 1:]


def draw(config: Rooms.Config, rng: np.random.Generator, n: int) -> Episodes:
    """The random part of n episodes."""
    plan, (first, last) = config.layout, config.schedule.copies
    return Episodes(
        draw_scenes(plan, rng, n),
        draw_starts(plan, rng, n),
        rng.integers(2**63, size=n).astype(np.uint64),
        rng.integers(first, last, size=n, endpoint=True),
    )


def script(config: Rooms.Config, episodes: Episodes, *, threads: int = 1) -> Script:
    """What the policy does; about half a microsecond a frame."""
    from recollect.envs.rooms.compiled import over_rows, plain
    from recollect.envs.rooms.motion import NOOP
    from recollect.envs.rooms.policy import ATTEMPTS, play_rooms

    n, T, plan = len(episodes.start), config.episode_length, config.layout
    walked = config.context_length - 1 if config.teleport else T
    schedule = np.array(config.schedule.switches, dtype=np.int64)
    states, actions = np.zeros((n, walked, 5)), np.zeros((n, walked), dtype=np.uint8)
    states[:, 0, :3] = episodes.start
    switches, attempts = np.zeros((n, len(schedule)), dtype=np.int64), np.zeros(n, dtype=np.int64)
    given = (
        np.array([room_of(plan, pose[None, :2])[0] for pose in episodes.start], dtype=np.int64),
        episodes.stream.astype(np.uint64),
        plain(plan.rooms, np.int64),
        plain(plan.ways, np.float64),
        schedule,
        plain(episodes.scene.grid, np.uint8),
    )
    found = (states, actions, switches, attempts)
    over_rows(n, threads, lambda begin, end: play_rooms(begin, end, *given, *found))
    if attempts.max(initial=0) > ATTEMPTS:
        raise ConfigError(f"rooms: the policy found no way in {ATTEMPTS} attempts; start in a room of the plan")
    if config.teleport:
        states, actions = _replayed(config, episodes, states), _replayed(config, episodes, actions)
        actions[:, walked] = NOOP
    return Script(states, actions, switches, attempts)


def play(config: Rooms.Config, episodes: Episodes) -> Frames:
    """The scripted episodes, with the keys of ``generate``."""
    n, T = len(episodes.start), config.episode_length
    states, actions = script(config, episodes)[:2]
    room = np.stack([room_of(config.layout, walk[:, :2]) for walk in states])
    if config.teleport:
        room = _replayed(config, episodes, room[:, : config.context_length - 1])
    return {
        "image": reduced(pictures(episodes.scene, states), config.side),
        "action": actions,
        "reward": np.zeros((n, T), dtype=np.float32),
        **marks(n, T),
        **probes(episodes.scene, states),
        "room": room,
    }


def _replayed(config: Rooms.Config, episodes: Episodes, walked: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What was up to the teleport (n, t, ...), and then what followed the frame it leads back to."""
    rows = np.arange(len(walked))[:, None]
    again = episodes.copied[:, None] + np.arange(config.query_length + 1)
    return np.concatenate([walked, walked[rows, again]], axis=1)


def _first(episodes: Episodes) -> Episodes:
    one = slice(0, 1)
    return Episodes(episodes.scene.take(one), episodes.start[one], episodes.stream[one], episodes.copied[one])
