"""Random numbers inside compiled loops: SplitMix64, one stream per episode.

An episode's stream is one number, so what happens in it does not depend on the episodes computed beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.envs.rooms.compiled import Array, inner

_STEP, _A, _B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@inner
def roll(stream: Array) -> int:
    """The next 53 random bits of a stream (1,) uint64, as a number below 2^53."""
    stream[0] = stream[0] + _STEP
    z = stream[0]
    z = (z ^ (z >> np.uint64(30))) * _A
    z = (z ^ (z >> np.uint64(27))) * _B
    bits: Any = np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(11))
    return bits


@inner
def between(stream: Array, low: int, high: int) -> int:
    """An integer of low .. high, both included."""
    return low + roll(stream) % (high - low + 1)


@inner
def chance(stream: Array) -> float:
    """A number of 0 .. 1, 1 excluded."""
    return roll(stream) * (1.0 / 9007199254740992.0)
