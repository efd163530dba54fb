"""What every token task is: a seeded source of sequences that ask, and the solvers its scores are held against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from recollect.core.config import Config
from recollect.tasks.batch import PAD, Ints, TokenBatch

Size: TypeAlias = tuple[int, ...]
Split = Literal["train", "valid", "test"]
Oracle: TypeAlias = Callable[[TokenBatch], Ints]


@dataclass(frozen=True)
class TaskConfig(Config):
    """Base of the configs that describe a task."""

    @abstractmethod
    def build(self) -> Task:
        """The generator this config describes."""


class Task(ABC):
    """A generator of token batches, without any random state of its own: every batch is drawn from the caller's."""

    axes: tuple[str, ...]
    """What the numbers of a size count, outermost first: ("contexts", "keys")."""

    blind: str | None = None
    """The oracle that knows everything but the context; what a score exceeds it by is the context-binding gap."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id, or what the config sets aside."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Input tokens of the longest sample that will be drawn."""

    @abstractmethod
    def cells(self) -> list[Size]:
        """Every size that can be drawn; a score counts each of them alike."""

    @abstractmethod
    def length(self, size: Size) -> int:
        """Input tokens L of a sample of this size."""

    @abstractmethod
    def batch(
        self, rng: np.random.Generator, batch_size: int, *, size: Size | None = None, split: Split | None = None
    ) -> TokenBatch:
        """``batch_size`` samples of one size, without padding.

        ``size`` may lie anywhere in the id space, also below ``cells()``; None draws one of ``cells()`` for the whole
        batch. ``split`` admits only samples of that part; the parts share no table whatever the generator's seed.
        Raises ConfigError for a size outside the id space, an empty batch, or a size too small to be split.
        """

    @abstractmethod
    def mixed_batch(self, rng: np.random.Generator, batch_size: int, *, split: Split | None = None) -> TokenBatch:
        """``batch_size`` samples, each of a size of its own, padded on the right to the longest."""

    def batch_of(self, rng: np.random.Generator, sizes: Ints, *, split: Split | None = None) -> TokenBatch:
        """One sample of each of ``sizes`` (B, axes), anywhere in the id space, in that order and padded on the right.

        Drawn one by one here; a task that can draw them together says so by overriding it.
        """
        drawn = [self.batch(rng, 1, size=tuple(size), split=split) for size in sizes.tolist()]
        shape = (len(drawn), max(each.tokens.shape[1] for each in drawn))
        tokens, labels = np.full(shape, PAD, dtype=np.int64), np.full(shape, PAD, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.bool_)
        for row, each in enumerate(drawn):
            for out, given in ((tokens, each.tokens), (labels, each.labels), (mask, each.mask)):
                out[row, : given.shape[1]] = given[0]
        return TokenBatch(tokens, labels, mask, sizes.copy())

    @abstractmethod
    def render(self, tokens: Ints, answers: Ints | None = None) -> str:
        """One sample (L,) as text; with ``answers`` (L,), the answers at the asked positions follow ``->``."""

    @property
    @abstractmethod
    def oracles(self) -> Mapping[str, Oracle]:
        """Solvers that know part of the task, by name: each gives predictions (B, L) for a batch."""

    def told_at(self, batch: TokenBatch) -> Ints | None:
        """Where the value that answers each asked position was told, (B, L), -1 elsewhere; None if no one place."""
        del batch
        return None
