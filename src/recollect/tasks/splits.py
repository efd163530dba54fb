"""Disjoint parts by content: a sample belongs to train, valid or test by a hash of what it tells, whatever drew it.

Nothing is remembered and nothing has to be searched: a generator draws, hashes, and draws again what fell elsewhere.
One sample in ten belongs to ``valid`` and one to ``test``. The hash is of the set of facts told (this key has that
value in this context), so the same table told in another order belongs to the same part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.tasks.base import Split
from recollect.tasks.batch import Bools, Ints

PARTS: dict[Split, tuple[int, int]] = {"train": (0, 8), "valid": (8, 9), "test": (9, 10)}
"""Tenths of the hash that belong to each part."""

MAX_ROUNDS = 1000

Words = npt.NDArray[np.uint64]


class Facts(NamedTuple):
    """What samples tell, as small integers: ``facts`` (B, M, F), of which ``used`` (B, M) count."""

    facts: Ints
    used: Bools


def content_hash(told: Facts) -> Words:
    """A 64-bit hash (B,) of every sample's set of facts, the same on every machine. O(B M F)."""
    each = np.full(told.facts.shape[:2], 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in np.moveaxis(told.facts, -1, 0):
        each = _mix(each ^ column.astype(np.uint64))
    return _mix(np.where(told.used, each, np.uint64(0)).sum(axis=1, dtype=np.uint64))


def belongs(told: Facts, split: Split) -> Bools:
    """Whether each sample (B,) belongs to ``split``."""
    low, high = PARTS[split]
    tenth = content_hash(told) % np.uint64(10)
    return (tenth >= low) & (tenth < high)


def draw_in(split: Split | None, n: int, draw: Callable[[Ints], Ints], facts: Callable[[Ints, Ints], Facts]) -> Ints:
    """``n`` samples (n, ...) of ``split``: ``draw(rows)`` fills those rows, ``facts(rows, drawn)`` reads them.

    None takes them as they come. Raises ConfigError when there seem to be none: a sample that small has too few
    fillings to be split.
    """
    rows = np.arange(n, dtype=np.int64)
    drawn = draw(rows)
    if split is None:
        return drawn
    bad = rows[~belongs(facts(rows, drawn), split)]
    for _ in range(MAX_ROUNDS):
        if not len(bad):
            return drawn
        drawn[bad] = again = draw(bad)
        bad = bad[~belongs(facts(bad, again), split)]
    raise ConfigError(
        f"no sample of the {split} part turned up in {MAX_ROUNDS} draws: sizes this small have too few fillings to "
        "be split; use larger tables or more values"
    )


def _mix(word: Words) -> Words:
    """Every bit of the result depends on every bit of a 64-bit word (the finaliser of splitmix64)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
