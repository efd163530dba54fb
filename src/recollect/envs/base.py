"""What every environment declares: its scripted episodes, where imagination starts, and what a perfect memory predicts.

Time, here and in every store: ``action_t`` led to what is seen at t, ``reward_t`` arrives with it, and the first action
of an episode counts for nothing (``data.windows``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt

from recollect.core.config import Config

Frames: TypeAlias = dict[str, npt.NDArray[Any]]
"""Arrays of n episodes of T frames, (n, T, ...)."""

Observation: TypeAlias = Literal["tiles", "image"]


@dataclass(frozen=True)
class EnvConfig(Config, ABC):
    """Base of every environment's nested ``Config``. It makes the environment, and its scripted episodes without it."""

    actions: ClassVar[tuple[str, ...]]
    """What action 0, 1, ... is called."""
    observation: ClassVar[Observation]
    """The key of ``Frames`` that holds what is seen: codes of ``envs.tiles``, or pictures (h, w, 3) uint8."""
    n_codes: ClassVar[int] = 0
    """Where tiles are seen: the codes of ``envs.tiles`` below this number are all that can be."""
    block_episodes: ClassVar[int] = 256
    """Episodes drawn from one random stream. Part of the data's definition: another number gives other episodes."""

    constant: ClassVar[tuple[str, ...]] = ()
    """Keys of ``Frames`` that do not change within an episode: a store keeps one row of each per episode."""

    rewarded: ClassVar[bool] = False
    """Whether the reward of the last step is what a memory is needed for."""
    judged: ClassVar[bool] = False
    """Whether ``judge`` has something to say of imagined observations."""
    probed: ClassVar[tuple[str, ...]] = ()
    """Keys of ``Frames`` that a probe is asked: layout, position, direction, objects, in this order; or none."""

    @property
    def n_actions(self) -> int:
        """Width of a one-hot action."""
        return len(self.actions)

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Frames that a model observes before it imagines."""

    @property
    @abstractmethod
    def query_length(self) -> int:
        """Frames that it imagines."""

    @property
    def episode_length(self) -> int:
        """Frames of a scripted episode."""
        return self.context_length + self.query_length

    @property
    @abstractmethod
    def observation_shape(self) -> tuple[int, ...]:
        """Of one frame of ``observation``."""

    @abstractmethod
    def build(self, *, pixels: bool = False, render_mode: str | None = None) -> MemoryEnv:
        """The environment, for stepping; ``pixels``: as pictures where ``observation`` is tiles.

        Raises ConfigError where it needs a package that is not installed.
        """

    @abstractmethod
    def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
        """Scripted episodes of T = ``episode_length`` frames.

        The key ``observation``; ``action`` uint8, index of the action that led to the frame (0 at the first);
        ``reward`` float32; ``is_first``, ``is_last``, ``is_terminal`` bool; and what probes may ask for, by name.
        """

    @abstractmethod
    def oracle(self, frames: Frames) -> dict[str, float]:
        """Scores of a solver with a perfect memory, each 1 where it is always right.

        It sees the context of ``frames`` and the actions of the query, and predicts what the query shows. It reads
        what is seen and done, not the keys for probes; what it cannot know is not asked.
        """

    def judge(self, imagined: npt.NDArray[np.uint8], frames: Frames) -> dict[str, float]:  # noqa: ARG002 (of some)
        """What imagined observations (n, query_length, ...) get right beyond the look of frames, each at best 1.

        ``frames`` are the whole episodes: ``observation`` and ``action``. Nothing, unless ``judged``.
        """
        return {}


class MemoryEnv(gymnasium.Env[npt.NDArray[np.uint8], np.int64], ABC):
    """An environment to step through; it shows the ``observation`` of its config."""

    @abstractmethod
    def hidden_state(self) -> dict[str, Any]:
        """What the observation does not show, by the names of the probing keys of ``EnvConfig.generate``."""

    @abstractmethod
    def scripted_actions(self) -> npt.NDArray[np.uint8]:
        """The actions (episode_length - 1,) of the scripted policy from the start of this episode."""
