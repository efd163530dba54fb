"""What a world model remembers with: the interface between what it sees and what it expects.

    history  h_t from z_0 .. z_{t-1} and a_1 .. a_t     (a recurrent posterior reads frames through its z as well)
    prior    p(z_t | h_t)
    posterior q(z_t | ...)                              of the frame's features, with or without h_t

``S4WM`` keeps the posterior free of history and is parallel over time; ``RSSM`` is recurrent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recollect.core.config import Config
from recollect.core.errors import ConfigError
from recollect.core.types import Aux, State
from recollect.models import latent
from recollect.models.latent import LatentConfig


class WorldState(NamedTuple):
    """All that imagination starts from: what the dynamics carries, and the last step's latent (B, Z) and history
    (B, D).
    """

    inner: State
    z: Tensor
    h: Tensor


class Observed(NamedTuple):
    """Frames, understood: h (B, T, D), z (B, T, Z), log q and log p (B, T, groups, classes), the state to go on
    from.
    """

    h: Tensor
    z: Tensor
    log_q: Tensor
    log_p: Tensor
    state: WorldState
    aux: Aux


class Frames(NamedTuple):
    """What the dynamics is told of T steps: features of what was seen (B, T, F), actions that led there (B, T, A),
    first steps (B, T) bool, uniform noise (B, T, groups, 1) to sample latents by (None: their mode), and whether it is
    known that every row has a first step where it begins and nowhere else.
    """

    features: Tensor
    action: Tensor
    is_first: Tensor
    noise: Tensor | None
    unbroken: bool = False


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig(Config, ABC):
    """Base of the configs of ``Dynamics``.

    ``chunk`` truncates back-propagation through time: the state is carried from one chunk of that many steps of a
    sequence to the next, gradients are not. None: gradients reach over the whole sequence.
    """

    latent: LatentConfig = field(default_factory=LatentConfig)
    hidden: int = 128
    """Width of the MLPs around the memory."""
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ConfigError(f"{self.kind}: hidden must be at least 1, got {self.hidden}")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"{self.kind}: chunk must be at least 1 or null, got {self.chunk}")

    @property
    @abstractmethod
    def d_history(self) -> int:
        """D: width of h."""

    @abstractmethod
    def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
        """Bytes that imagination needs of ``batch`` sequences after ``seen`` frames: the memory and the last latent."""

    def build(self, n_features: int, n_actions: int) -> Dynamics:
        """The module, for frames of F features and actions of width A."""
        return DYNAMICS[type(self)](self, n_features, n_actions)


DYNAMICS: dict[type[DynamicsConfig], type[Dynamics]] = {}


class Dynamics(nn.Module, ABC):
    """Base of the memories of world models. Subclasses nest ``Config(DynamicsConfig, kind=...)``."""

    Config: ClassVar[Any]
    latent: LatentConfig
    prior_head: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        DYNAMICS[cls.Config] = cls

    @abstractmethod
    def init_state(self, batch: int) -> WorldState:
        """Before the first frame of an episode."""

    @abstractmethod
    def observe(self, frames: Frames, state: WorldState | None = None) -> Observed:
        """Take in T frames after ``state`` (None: the beginning). At a first step all that came before is forgotten."""

    @abstractmethod
    def step(self, z: Tensor, action: Tensor, inner: State) -> tuple[Tensor, State]:
        """One step without a frame: h_t (B, D) from z_{t-1} (B, Z), a_t (B, A) and what is carried."""

    @abstractmethod
    def compiled(self) -> list[nn.Module]:
        """The modules whose calls in ``observe`` take the time, for ``torch.compile``."""

    def prior(self, h: Tensor) -> Tensor:
        """log p(z_t | h_t), (..., groups, classes)."""
        return latent.log_probabilities(self.prior_head(h), self.latent)
