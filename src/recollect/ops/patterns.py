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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from recollect.core.config import Config
from recollect.core.errors import ConfigError, nearest

HashRule = Literal["sign", "argmax"]
"""How a vector's bucket is read off its projections (``ops.hashing``)."""
Rounds = Literal["hashed", "probed"]
"""Whether hash rounds are several hashes, or several buckets of one."""


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
    """Per hash round, the most recent ``n_keys / n_rounds`` keys in the query's bucket, one of 2^n_bits.

    ``rule`` "sign" (the synthetic setting of arXiv 2507.00449): the signs of ``n_bits`` projections are the bucket's
    binary digits; hashing costs N n_bits per vector and round. "argmax" (its language setting, appendix D.2): the
    bucket is the largest of 2^n_bits projections, one cone about each of as many directions, at N 2^n_bits.

    Rounds share the budget. A query and a key at angle t meet in a round of signs with probability (1 - t/pi)^n_bits:
    one round of many bits needs nearly parallel vectors, several rounds of fewer bits find looser matches.

    ``rounds`` "hashed": every round has a hash of its own. "probed": all have one, and round r reads the bucket that is
    r-th nearest to the query (multi-probe hashing, Lv et al. 2007), which finds keys just across a border that the
    query is close to, without another hash. ``n_rounds`` is then at most ``n_bits`` + 1.
    """

    n_bits: int = 8
    n_rounds: int = 1
    rule: HashRule = "sign"
    rounds: Rounds = "hashed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in get_args(HashRule):
            raise ConfigError(f"pattern lsh: rule '{self.rule}' is unknown{nearest(self.rule, get_args(HashRule))}")
        if not 1 <= self.n_bits <= 16:
            raise ConfigError(f"pattern lsh: n_bits must be in 1..16, got {self.n_bits}")
        if self.n_rounds < 1 or self.n_keys % self.n_rounds:
            raise ConfigError(f"pattern lsh: n_keys {self.n_keys} must be a multiple of n_rounds {self.n_rounds}")
        if self.rounds not in get_args(Rounds):
            raise ConfigError(f"pattern lsh: rounds '{self.rounds}' is unknown{nearest(self.rounds, get_args(Rounds))}")
        if self.rounds == "probed" and self.n_rounds > self.n_bits + 1:
            raise ConfigError(
                f"pattern lsh: {self.n_rounds} probed rounds need at least {self.n_rounds - 1} bits, got {self.n_bits}"
            )

    @property
    def n_buckets(self) -> int:
        """Buckets per round."""
        return 1 << self.n_bits

    @property
    def n_hashes(self) -> int:
        """Hash functions: one per round, or one for all where they are probed."""
        return 1 if self.rounds == "probed" else self.n_rounds

    @property
    def n_planes(self) -> int:
        """Projections per hash that the rule reads: ``n_bits`` signs, or one column per bucket."""
        return self.n_bits if self.rule == "sign" else self.n_buckets

    @property
    def slots(self) -> int | None:
        return self.n_keys * self.n_buckets


P = TypeVar("P", bound=Pattern)


def find(patterns: tuple[Pattern, ...], cls: type[P]) -> P | None:
    """The pattern of one type, if it is in the union."""
    return next((p for p in patterns if isinstance(p, cls)), None)


def check_patterns(patterns: tuple[Pattern, ...]) -> None:
    """Raise ConfigError unless the union is non-empty and names each type of pattern once."""
    if not patterns:
        raise ConfigError("sparse attention needs at least one pattern, for example (Window(64),)")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise ConfigError(f"{pattern!r} is not a pattern; give a spec, for example Window(64)")
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


def with_self(patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    """The union in which every query may also read its own key: ``Window(1)`` is added unless it already may."""
    return patterns if find(patterns, Window) or find(patterns, Full) else (*patterns, Window(1))


def published_pattern(name: str, n_keys: int = 64, max_length: int = 2048) -> tuple[Pattern, ...]:
    """A sparse row of the published tables (arXiv 2507.00449, tables 1 to 5), by the name it has there.

    "D" dilated, "SW" sliding window, "SW+D" both, "A" window and sink, "LSH" 8 sign bits, "KS" key selection, "HAX"
    the last two, and "full" dense attention, which the tables leave out. ``n_keys`` (64 in table 1, 128 in the others)
    is shared evenly by the parts of a union. A dilation reaches back ``max_length``: the published code leaves that at
    2048 on sequences of at most 1057, so half of its keys never exist; give the task's own length for a fair row.

    Raises ConfigError for an unknown name and for a budget that cannot be shared.
    """
    half = n_keys // 2
    if n_keys < 2 or n_keys % 2:
        raise ConfigError(f"n_keys must be even and at least 2, as unions share it in halves; got {n_keys}")
    if max_length < n_keys:
        raise ConfigError(f"max_length {max_length} must be at least n_keys {n_keys}")
    rows: Mapping[str, tuple[Pattern, ...]] = {
        "D": (Dilated(n_keys, stride=max_length // n_keys),),
        "SW": (Window(n_keys),),
        "SW+D": (Window(half), Dilated(half, stride=max_length // half)),
        "A": (Window(half), Sink(half)),
        "LSH": (Lsh(n_keys, n_bits=8),),
        "KS": (KeySelection(n_keys),),
        "HAX": (Lsh(half, n_bits=8), KeySelection(half)),
        "full": (Full(),),
    }
    if name not in rows:
        raise ConfigError(f"unknown published pattern '{name}'{nearest(name, rows)}")
    return rows[name]
