"""What every environment's config declares about its scripted episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from recollect.core.config import Config


@dataclass(frozen=True)
class EnvConfig(Config, ABC):
    """Base of every environment's nested ``Config``: how long scripted episodes are, and where imagination starts."""

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
