"""What a prompt of the suite is, what every task of it is, and how text is fitted to a number of tokens."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from recollect.core.config import Config
from recollect.core.errors import ConfigError

Span: TypeAlias = tuple[int, int]
"""Characters [start, end) of a text."""

SEPARATOR = re.compile(r"\s*(?:,\s*and\b|[,;\n]|\band\b)\s*")
"""What stands between the items of a list that a model writes."""

INTERPOLATIONS = 8
"""Guesses of the length before the search halves instead."""

UNITS_PER_TOKEN = 4
"""More units than so many for every token that is free, and still room: the tokenizer cannot be meant."""


class TooShortError(ConfigError):
    """The shortest prompt of a task is longer than the length asked for."""


class Tokenizer(Protocol):
    """All that is asked of a tokenizer here."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text, without any added at its ends."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A context with a question at its end, and the answers that the continuation must hold."""

    text: str
    """Context and question; it ends where the answer begins."""
    answers: tuple[str, ...]
    completion: str
    """The continuation that a solver of the task would write, a space first; it names every answer."""
    ordered: bool = False
    """Whether the i-th answer must be the i-th item of the continuation; else they count wherever they are."""
    depth: float | None = None
    """Where the told things stand, 0 the beginning and 1 the end; None where a task has no such place."""
    spans: tuple[Span, ...] = ()
    """Where ``text`` tells the answers, one span for each sentence they follow from, in their order."""
    chance: float | None = None
    """Expected share found by a guesser that knows the form of the answers and nothing of the text."""
    guesser: float | None = None
    """Expected share found by one that has read what could be answers, and binds none to what is asked. None where
    that is no guess: whatever could be an answer is one."""
    n_tokens: int = 0
    """Tokens of ``text``."""
    n_answer_tokens: int = 0
    """Tokens of ``completion``."""

    @property
    def answer_spans(self) -> list[Span]:
        """Where each answer stands in ``completion``."""
        spans: list[Span] = []
        start = 0
        for answer in self.answers:
            found = _standing(answer, self.completion, start)
            assert found is not None, f"'{answer}' is not in '{self.completion}'"
            spans.append(found)
            start = found[1]
        return spans

    def found(self, continuation: str) -> float:
        """The share of answers that stand in a continuation as whole words, letter by letter."""
        if not self.ordered:
            return sum(_standing(answer, continuation) is not None for answer in self.answers) / len(self.answers)
        items = [item for item in SEPARATOR.split(continuation) if item]
        pairs = zip(self.answers, items, strict=False)
        return sum(_standing(answer, item) is not None for answer, item in pairs) / len(self.answers)


def _standing(answer: str, text: str, start: int = 0) -> Span | None:
    """Where an answer stands as a whole word; part of a longer one, or of a hyphenated one, does not count."""
    found = re.compile(rf"(?<![\w-]){re.escape(answer)}(?![\w-])").search(text, start)
    return None if found is None else found.span()


class Plan(NamedTuple):
    """A sample whose length is still open: ``compose(n)`` writes it with n units of whatever fills it."""

    compose: Callable[[int], Prompt]
    least: int = 0


@dataclass(frozen=True)
class SuiteConfig(Config):
    """Base of the configs of the suite's tasks."""

    @abstractmethod
    def build(self) -> SuiteTask:
        """The generator this config describes."""


class SuiteTask(ABC):
    """A generator of prompts of any length, without random state of its own."""

    has_depth: bool = True
    """Whether ``depth`` moves anything."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config

    @abstractmethod
    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        """Everything drawn but how much of it there will be. ``compose`` must give the same text for the same n, and
        longer text for a larger one, by about a sentence for each unit.
        """

    def sample(
        self,
        rng: np.random.Generator,
        length: int,
        depth: float = 0.5,
        tokenizer: Tokenizer | None = None,
        *,
        reserve: int = 0,
    ) -> Prompt:
        """A prompt of at most ``length`` tokens together with its completion and ``reserve`` more, and less than a
        sentence short of it. Without a tokenizer the bytes of UTF-8 count.

        Cost: about ten encodings of the whole text. Raises ConfigError for a depth outside [0, 1], and its
        TooShortError when the shortest prompt of this task is longer than ``length``.
        """
        if not 0.0 <= depth <= 1.0:
            raise ConfigError(f"{self.config.kind}: depth must lie in [0, 1], got {depth:g}")
        sizes = Sizes(tokenizer, length - reserve)
        prompt = fitted(self.plan(rng, depth, sizes), sizes, self.config.kind)
        return prompt if self.has_depth else replace(prompt, depth=None)


@dataclass
class Sizes:
    """Counts tokens against a budget."""

    tokenizer: Tokenizer | None
    budget: int

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(text.encode()) if self.tokenizer is None else len(self.tokenizer.encode(text))

    def measured(self, prompt: Prompt) -> Prompt:
        """The prompt with its tokens counted."""
        return replace(prompt, n_tokens=self.count(prompt.text), n_answer_tokens=self.count(prompt.completion))


def fitted(plan: Plan, sizes: Sizes, name: str) -> Prompt:
    """The prompt with n units that fits where one with n + 1 would not.

    The size of n units grows almost linearly: each guess follows the mean size of a unit so far.
    """

    def measure(n: int) -> tuple[Prompt, int]:
        prompt = sizes.measured(plan.compose(n))
        return prompt, prompt.n_tokens + prompt.n_answer_tokens

    low = plan.least
    best, first = measure(low)
    if first > sizes.budget:
        raise TooShortError(
            f"{name}: the shortest prompt of this kind takes {first} tokens and {sizes.budget} are free; "
            "use a longer length or a smaller config"
        )
    size, high, per_unit, step = first, None, float(max(1, sizes.budget - first)) / 8, 1
    attempt = 0
    while high is None or high - low > 1:
        ahead = max(1, int((sizes.budget - size) / per_unit))
        if attempt >= INTERPOLATIONS:
            ahead = step if high is None else (high - low) // 2
            step *= 2
        attempt += 1
        n = low + ahead if high is None else min(low + ahead, high - 1)
        prompt, total = measure(n)
        if n > plan.least and total > first:
            per_unit = max((total - first) / (n - plan.least), 1e-3)
        if total <= sizes.budget:
            best, size, low = prompt, total, n
            if n - plan.least > UNITS_PER_TOKEN * sizes.budget:
                raise ConfigError(f"{name}: the tokenizer gives {total} tokens for {len(prompt.text)} characters")
        else:
            high = n
    return best


def child(rng: np.random.Generator) -> np.random.Generator:
    """A generator for what is drawn while a length is sought: how much that is must not move anything else."""
    return np.random.default_rng(int(rng.integers(1 << 62)))


@dataclass
class Units:
    """The first units of an endless stream, kept so that every length shows the same ones."""

    stream: Iterator[str]
    drawn: list[str] = field(default_factory=list[str])

    def first(self, n: int) -> list[str]:
        """The first n. Raises ConfigError when the stream ends before."""
        while len(self.drawn) < n:
            unit = next(self.stream, None)
            if unit is None:
                raise ConfigError(f"the filler ends after {len(self.drawn)} units; use longer keys or values")
            self.drawn.append(unit)
        return self.drawn[:n]


def laid(units: Sequence[str], inserts: Sequence[tuple[float, str]]) -> tuple[str, list[Span]]:
    """Units joined by spaces with each insert at the boundary nearest to its share of their characters, and where
    each insert is. Those at one boundary keep their order. O(units + inserts).
    """
    ends = np.cumsum([0, *(len(unit) + 1 for unit in units)])
    wanted = np.array([share for share, _ in inserts], dtype=np.float64) * ends[-1]
    after = np.searchsorted(ends, wanted)
    before = np.maximum(after - 1, 0)
    places = np.where(wanted - ends[before] < ends[np.minimum(after, len(units))] - wanted, before, after)
    pieces: list[str] = []
    spans: list[Span] = [(0, 0)] * len(inserts)
    used = at = 0
    for i in np.argsort(places, kind="stable").tolist():
        pieces += units[used : places[i]]
        at += int(ends[places[i]] - ends[used])
        used = int(places[i])
        text = inserts[i][1]
        pieces.append(text)
        spans[i] = (at, at + len(text))
        at += len(text) + 1
    return " ".join([*pieces, *units[used:]]), spans


def framed(header: str, body: str, spans: Sequence[Span], question: str) -> tuple[str, tuple[Span, ...]]:
    """A body between its header and its question, a line each, with the body's spans moved along."""
    top = f"{header}\n" if header else ""
    return f"{top}{body}\n{question}", tuple((a + len(top), b + len(top)) for a, b in spans)


def band(depth: float, n: int, width: float) -> list[float]:
    """n depths evenly over a band of ``width`` that is at the beginning for depth 0 and at the end for depth 1."""
    if n == 1:
        return [depth]
    start = depth * (1.0 - width)
    return [start + width * i / (n - 1) for i in range(n)]
