"""Typed specs of which keys a query may attend to, for causal sparse attention.

Position i attends to a set A_i of positions j <= i of its own segment (a segment starts at a reset). A tuple of
patterns is the union of their sets without duplicates, each spending its own budget ``n_keys``.

Every pattern but ``Full`` keeps, for each group of keys, the top ``n_keys`` of the prefix by some priority, so a key
lives from its arrival until enough better ones have come, and never returns:

================  ==========================================  =======================  =========================
pattern           priority                                    group of keys            memory slots
================  ==========================================  =======================  =========================
``Window``        most recent first                           all                      n_keys
``Sink``          earliest first                              all                      n_keys
``Dilated``       most recent first                           every ``stride``-th key  n_keys
``KeySelection``  learned score (ties: most recent)           all                      n_keys
``Lsh``           most recent first                           its hash bucket          2^n_bits * n_keys
``Full``          every key is admitted                       all                      grows with the sequence
================  ==========================================  =======================  =========================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from recollect.core.config import Config
from recollect.core.errors import ConfigError


@dataclass(frozen=True)
class Pattern(Config, ABC):
    """Base of every sparse pattern."""

    @property
    @abstractmethod
    def budget(self) -> int | None:
        """Most keys one query may get from this pattern; None when there is no bound."""

    @property
    def slots(self) -> int | None:
        """Most keys that must be remembered for later queries; None when there is no bound."""
        return self.budget


@dataclass(frozen=True)
class Full(Pattern, kind="full"):
    """Every earlier key of the segment and the query's own: dense causal attention."""

    @property
    def budget(self) -> int | None:
        return None


@dataclass(frozen=True)
class _Budgeted(Pattern):
    n_keys: int

    def __post_init__(self) -> None:
        if self.n_keys < 1:
            raise ConfigError(f"pattern {self.kind}: n_keys must be at least 1, got {self.n_keys}")

    @property
    def budget(self) -> int | None:
        return self.n_keys


@dataclass(frozen=True)
class Window(_Budgeted, kind="window"):
    """The ``n_keys`` most recent keys, the query's own among them."""


@dataclass(frozen=True)
class Sink(_Budgeted, kind="sink"):
    """The first ``n_keys`` keys of the segment."""


@dataclass(frozen=True)
class Dilated(_Budgeted, kind="dilated"):
    """The ``n_keys`` most recent keys at in-segment positions p with p mod stride = stride - 1."""

    stride: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ConfigError(f"pattern dilated: stride must be at least 1, got {self.stride}")


@dataclass(frozen=True)
class KeySelection(_Budgeted, kind="key-selection"):
    """The ``n_keys`` keys of highest learned score among those seen so far; an evicted key never returns."""


@dataclass(frozen=True)
class Lsh(_Budgeted, kind="lsh"):
    """Per hash round, the most recent ``n_keys / n_rounds`` keys in the query's bucket of 2^n_bits."""

    n_bits: int = 8
    n_rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_bits <= 16:
            raise ConfigError(f"pattern lsh: n_bits must be in 1..16, got {self.n_bits}")
        if self.n_rounds < 1 or self.n_keys % self.n_rounds:
            raise ConfigError(f"pattern lsh: n_keys {self.n_keys} must be a multiple of n_rounds {self.n_rounds}")

    @property
    def slots(self) -> int | None:
        return self.n_keys << self.n_bits


P = TypeVar("P", bound=Pattern)


def find(patterns: tuple[Pattern, ...], cls: type[P]) -> P | None:
    """The pattern of one type, if it is in the union."""
    return next((p for p in patterns if isinstance(p, cls)), None)


def check_patterns(patterns: tuple[Pattern, ...]) -> None:
    """Raise ConfigError unless the union is non-empty and names each type of pattern once."""
    if not patterns:
        raise ConfigError("sparse attention needs at least one pattern, for example (Window(64),)")
    kinds = [p.kind for p in patterns]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ConfigError(f"pattern {kind} is given {kinds.count(kind)} times; give it once with a larger budget")


def key_budget(patterns: tuple[Pattern, ...]) -> int | None:
    """Most keys any query attends to under the union; None with ``Full``."""
    budgets = [p.budget for p in patterns]
    return None if None in budgets else sum(b for b in budgets if b is not None)


def memory_slots(patterns: tuple[Pattern, ...]) -> int | None:
    """Memory slots that the union needs between calls; None with ``Full``."""
    slots = [p.slots for p in patterns]
    return None if None in slots else sum(s for s in slots if s is not None)
