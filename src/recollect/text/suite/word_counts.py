"""Words that come more often than others: the whole context has to be counted, and no place of it holds the answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.base import Plan, Prompt, Sizes, SuiteConfig, SuiteTask, framed
from recollect.text.suite.names import listed, take
from recollect.text.suite.vocabulary import ADJECTIVES, THINGS

ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gr", "kl", "pl", "st", "tr")
VOWELS = (*"aeiou",)


class CommonWords(SuiteTask):
    """A list in which ``n_answers`` words come equally often, and every other at most a third as often.

    With more words in the list, more different ones are in it until all words there are have been used.
    """

    has_depth = False

    @dataclass(frozen=True)
    class Config(SuiteConfig, kind="suite-common-words"):
        """``share`` of the list are the common words. Raises ConfigError for counts or shares out of range."""

        n_answers: int = 5
        share: float = 0.5
        ratio: int = 3
        """A common word comes at least so many times as often as another."""

        def __post_init__(self) -> None:
            _check_answers(self.kind, self.n_answers, len(THINGS) // 4)
            if not 0.0 < self.share < 1.0:
                raise ConfigError(f"{self.kind}: share must lie between 0 and 1, got {self.share:g}")
            if self.ratio < 2:
                raise ConfigError(f"{self.kind}: ratio must be at least 2, got {self.ratio}")
            if self.gap <= 0:
                raise ConfigError(f"{self.kind}: no list makes these common; use fewer n_answers or a larger share")

        @property
        def gap(self) -> float:
            """What a word more in the list adds to a common word's count beyond ``ratio`` times another's."""
            n_others = len(THINGS) + len(ADJECTIVES) - self.n_answers
            return self.share / self.n_answers - self.ratio * (1 - self.share) / n_others

        @property
        def least(self) -> int:
            """The fewest words of a list that fulfils the promise, with one more or less of each by rounding."""
            return math.ceil((1 + self.ratio) / self.gap)

        def build(self) -> CommonWords:
            return CommonWords(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        del depth, sizes
        options, words = self.options, (*THINGS, *ADJECTIVES)
        order = [words[i] for i in rng.permutation(len(words)).tolist()]
        common, others = order[: options.n_answers], order[options.n_answers :]
        seed = int(rng.integers(1 << 62))
        header = "A list of words follows, and some come more often than others."

        def compose(n: int) -> Prompt:
            each = int(n * options.share) // options.n_answers
            rest = n - each * options.n_answers
            listing = [word for word in common for _ in range(each)] + [others[i % len(others)] for i in range(rest)]
            body = _shuffled(listing, seed)
            answers = tuple(dict.fromkeys(word for word in body if word in set(common)))
            return _asked(header, body, f"The {options.n_answers} most common words are", answers, len(words))

        return Plan(compose, options.least)


class FrequentWords(SuiteTask):
    """Made-up words whose counts fall as a power of their rank, count ~ rank^-exponent; the first are asked for."""

    has_depth = False

    @dataclass(frozen=True)
    class Config(SuiteConfig, kind="suite-frequent-words"):
        """Raises ConfigError for counts out of range, or an exponent that does not set the asked words apart."""

        n_answers: int = 3
        n_words: int = 50
        """Different words of the list."""
        exponent: float = 1.5

        def __post_init__(self) -> None:
            _check_answers(self.kind, self.n_answers, self.n_words - 1)
            if not 0.1 <= self.exponent <= 10.0:
                raise ConfigError(f"{self.kind}: exponent must lie between 0.1 and 10, got {self.exponent:g}")

        @property
        def shares(self) -> Sequence[float]:
            """The share of every rank."""
            weight = np.arange(1, self.n_words + 1, dtype=np.float64) ** -self.exponent
            return (weight / weight.sum()).tolist()

        @property
        def least(self) -> int:
            """The fewest words with which each asked word comes more often than the next."""
            shares = self.shares[: self.n_answers + 1]
            # Rounded up or down, counts differ as soon as what was rounded differs by two.
            return math.ceil(2 / min(a - b for a, b in pairwise(shares)))

        def build(self) -> FrequentWords:
            return FrequentWords(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        del depth, sizes
        options = self.options
        words = take(_made_up(rng), options.n_words)
        shares = np.array(options.shares)
        seed = int(rng.integers(1 << 62))
        header = "A list of made-up words follows, and some come more often than others."

        def compose(n: int) -> Prompt:
            counts = np.floor(n * shares).astype(int)
            counts[np.argsort(counts - n * shares, kind="stable")[: n - counts.sum()]] += 1  # the largest remainders
            body = _shuffled([word for word, k in zip(words, counts.tolist(), strict=True) for _ in range(k)], seed)
            question = f"The {options.n_answers} most frequent words, most frequent first, are"
            return _asked(header, body, question, tuple(words[: options.n_answers]), None)

        return Plan(compose, options.least)


def _asked(header: str, body: list[str], question: str, answers: tuple[str, ...], n_known: int | None) -> Prompt:
    """The prompt of a list; a guesser names distinct words of it, and chance those of the ``n_known`` there are."""
    text, _ = framed(header, " ".join(body), (), question)
    different = len(Counter(body))
    return Prompt(
        text,
        answers,
        f" {listed(answers)}.",
        chance=len(answers) / n_known if n_known else None,
        guesser=len(answers) / different if different > len(answers) else None,
    )


def _shuffled(words: list[str], seed: int) -> list[str]:
    return [words[i] for i in np.random.default_rng(seed).permutation(len(words)).tolist()]


def _check_answers(kind: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ConfigError(f"{kind}: n_answers must lie between 1 and {most}, got {n}")


def _made_up(rng: np.random.Generator) -> Iterator[str]:
    """Words of two syllables, none twice, that are nobody's."""
    seen: set[str] = set()
    while len(seen) < (len(ONSETS) * len(VOWELS)) ** 2 // 2:
        word = "".join(str(rng.choice(ONSETS)) + str(rng.choice(VOWELS)) for _ in range(2))
        if word not in seen:
            seen.add(word)
            yield word
