"""Names and values drawn from the word lists: as many distinct ones as are asked for, and values of three forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.vocabulary import ADJECTIVES, THINGS

Form = Literal["number", "word", "id"]
Keys = Literal["word", "pair", "id"]

TRIES = 32
"""Draws that may repeat an earlier name before names get one word longer."""

GROUPS = (8, 4, 4, 4, 12)
"""The digits of an id of 32, between hyphens."""


@dataclass(frozen=True)
class Values:
    """What is remembered: ``number`` of ``size`` decimal digits, ``word``: so many joined by hyphens, ``id``: so many
    hexadecimal digits, in five groups when they are 32.

    Raises ConfigError for an unknown form or a size below 1.
    """

    form: Form = "number"
    size: int = 4

    def __post_init__(self) -> None:
        if self.form not in ("number", "word", "id"):
            raise ConfigError(f"values: form must be 'number', 'word' or 'id', got '{self.form}'")
        if self.size < 1:
            raise ConfigError(f"values: size must be at least 1, got {self.size}")

    @property
    def count(self) -> float:
        """How many there are, each as likely as any other."""
        if self.form == "number":
            return 9.0 * 10.0 ** (self.size - 1)
        return 16.0**self.size if self.form == "id" else len(THINGS) * float(len(ADJECTIVES)) ** (self.size - 1)

    def draw(self, rng: np.random.Generator) -> str:
        """One value, uniformly."""
        if self.form == "id":
            return hex_id(rng, self.size)
        if self.form == "number":
            return str(rng.integers(1, 10)) + "".join(map(str, rng.integers(0, 10, self.size - 1).tolist()))
        return "-".join([*(_pick(rng, ADJECTIVES) for _ in range(self.size - 1)), _pick(rng, THINGS)])

    def distinct(self, rng: np.random.Generator) -> Iterator[str]:
        """Values, none twice, until there are no more."""
        seen: set[str] = set()
        while len(seen) < self.count:
            value = self.draw(rng)
            if value not in seen:
                seen.add(value)
                yield value


FOUR_DIGITS = Values("number", 4)


def hex_id(rng: np.random.Generator, size: int) -> str:
    """So many hexadecimal digits; 32 of them are grouped as in a UUID."""
    digits = rng.bytes((size + 1) // 2).hex()[:size]
    if size != sum(GROUPS):
        return digits
    starts = np.cumsum((0, *GROUPS)).tolist()
    return "-".join(digits[a:b] for a, b in pairwise(starts))


def distinct_names(rng: np.random.Generator, nouns: tuple[str, ...], words: int = 1) -> Iterator[str]:
    """Names without end, none twice: the nouns in random order, then with an adjective before them, then with two.

    ``words`` begins with names of so many words, so that early ones look like late ones.
    """
    if words == 1:
        yield from (nouns[i] for i in rng.permutation(len(nouns)).tolist())
        words = 2
    seen: set[str] = set()
    repeated = 0
    while True:
        name = " ".join([*(_pick(rng, ADJECTIVES) for _ in range(words - 1)), _pick(rng, nouns)])
        if name in seen:
            repeated += 1
            if repeated == TRIES:
                words, repeated = words + 1, 0
            continue
        seen.add(name)
        repeated = 0
        yield name


def distinct_keys(rng: np.random.Generator, keys: Keys) -> Iterator[str]:
    """What needles are named by: things, things with an adjective, or ids of eight digits; none twice."""
    if keys == "id":
        return Values("id", 8).distinct(rng)
    return distinct_names(rng, THINGS, 1 if keys == "word" else 2)


def take(names: Iterator[str], n: int) -> list[str]:
    """The next ``n``. Raises ConfigError when there are fewer."""
    found = list(islice(names, n))
    if len(found) < n:
        raise ConfigError(f"{n} different names or values are needed and there are {len(found)}; use longer ones")
    return found


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
