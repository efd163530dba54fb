"""Small samples first: which sizes a training step draws."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from recollect.core.config import Config
from recollect.core.errors import ConfigError
from recollect.tasks.base import Size

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""An inclusive range (low, high) for every axis of a size."""


@dataclass(frozen=True)
class Stage(Config, kind="stage"):
    """Up to and including the 1-based step ``until_step``, sizes are uniform over ``sizes``, a range per task axis.

    With ``ramp`` the upper ends grow linearly over the stage to those of the next one, after the last stage to the
    task's largest; the lower ends stay. Sizes below the task's own are allowed, and no score counts them.
    """

    until_step: int
    sizes: tuple[tuple[int, int], ...]
    ramp: bool = False

    def __post_init__(self) -> None:
        if self.until_step < 1:
            raise ConfigError(f"curriculum: until_step must be at least 1, got {self.until_step}")
        for low, high in self.sizes:
            if not 1 <= low <= high:
                raise ConfigError(f"curriculum: sizes are ranges (low, high) from 1, got ({low}, {high})")


def check_order(curriculum: tuple[Stage, ...]) -> None:
    """Raise ConfigError unless every stage ends after the one before it."""
    ends = [stage.until_step for stage in curriculum]
    if any(later <= earlier for earlier, later in pairwise(ends)):
        raise ConfigError(f"curriculum: until_step must grow from stage to stage, got {', '.join(map(str, ends))}")


def ranges_at(curriculum: tuple[Stage, ...], step: int, largest: Size) -> Ranges | None:
    """The ranges of a 1-based step, or None once the task's own sizes are drawn. The last ramp ends at ``largest``."""
    for i, stage in enumerate(curriculum):
        if step <= stage.until_step:
            if not stage.ramp:
                return stage.sizes
            first = 1 + (curriculum[i - 1].until_step if i else 0)
            ends = largest if stage is curriculum[-1] else tuple(high for _, high in curriculum[i + 1].sizes)
            done, whole = step - first, max(1, stage.until_step - first)
            grown = (high + (end - high) * done // whole for (_, high), end in zip(stage.sizes, ends, strict=True))
            return tuple((low, max(low, high)) for (low, _), high in zip(stage.sizes, grown, strict=True))
    return None
