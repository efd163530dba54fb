"""What every environment's config declares about its scripted episodes."""

from __future__ import annotations

from dataclasses import dataclass

from recollect.core.config import Config


@dataclass(frozen=True)
class EnvConfig(Config):
    """Base of every environment's nested ``Config``: how long scripted episodes are, and where imagination starts."""

    @property
    def context_length(self) -> int:
        """Frames that a model observes before it imagines."""
        raise NotImplementedError

    @property
    def query_length(self) -> int:
        """Frames that it imagines."""
        raise NotImplementedError

    @property
    def episode_length(self) -> int:
        """Frames of a scripted episode."""
        return self.context_length + self.query_length
