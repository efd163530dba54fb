"""Recall from nested contexts: a value for every key under every chain of contexts, told once and then asked for.

What associative recall (no context), joint recall (one level) and multi-level joint recall have in common. Told: for
every outermost context its token, then everything below it, down to the keys, each followed by its value. Contexts and
keys come in a fresh random order wherever they stand. Asked, after ``sep``:

- every cell (``n_queries=None``): the same blocks again, in orders of their own;
- ``n_queries`` distinct cells drawn at random: for each its contexts, its key and its value, and so the same number
  of tokens whichever are drawn.

The answer follows its key in the input too (the model is teacher-forced), where it says nothing about any other cell;
``hide_answers`` puts ``BLANK`` in its place.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from recollect.core.errors import ConfigError
from recollect.tasks import blocks
from recollect.tasks.base import Oracle, Size, Split, Task, TaskConfig
from recollect.tasks.batch import Ints, TokenBatch
from recollect.tasks.oracles import nested_oracles, told_at
from recollect.tasks.splits import Facts, draw_in
from recollect.tasks.vocabulary import BLANK, BOS, SEP, Vocabulary


class Axis(NamedTuple):
    """One axis of the table: its name, the range of its sizes, the ids set aside, and the options that say so."""

    name: str
    option: str
    range: tuple[int, int]
    limit_option: str
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class NestedConfig(TaskConfig):
    """The options that all recall from nested contexts has; sizes are added by the task.

    Raises ConfigError for a size below 1, a reversed range, an id space smaller than the largest table, or more queries
    than the smallest table has cells.
    """

    n_values: int = 16
    n_queries: int | None = None
    """Distinct cells asked for; None: all of them, in blocks."""
    hide_answers: bool = False
    """``BLANK`` instead of every value after ``sep``; the labels keep the values."""
    random_ids: bool = False
    """Contexts and keys are drawn from all ids set aside, so that an id says nothing of the table's size."""
    vocab_size: int | None = None
    """Ids set aside for the whole vocabulary; None: as many as are needed. The published models have 100."""

    @property
    @abstractmethod
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the table, contexts outermost first, keys last."""

    def __post_init__(self) -> None:
        for axis in self.axes:
            low, high = axis.range
            if low < 1:
                raise ConfigError(f"{self.kind}: {axis.option} must be at least 1, got {low}")
            if low > high:
                raise ConfigError(f"{self.kind}: {axis.option} is a range (low, high), got ({low}, {high})")
            if axis.limit is not None and axis.limit < high:
                raise ConfigError(
                    f"{self.kind}: {axis.limit_option} must be at least {high}, the largest table, got {axis.limit}"
                )
        for name, value in (("n_values", self.n_values), ("n_queries", self.n_queries)):
            if value is not None and value < 1:
                raise ConfigError(f"{self.kind}: {name} must be at least 1, got {value}")
        fewest = prod(axis.range[0] for axis in self.axes)
        if self.n_queries is not None and self.n_queries > fewest:
            raise ConfigError(
                f"{self.kind}: n_queries must be at most {fewest}, all cells of the smallest table, "
                f"got {self.n_queries}"
            )
        needed = self.vocabulary().size
        if self.vocab_size is not None and self.vocab_size < needed:
            raise ConfigError(f"{self.kind}: vocab_size must be at least {needed}, got {self.vocab_size}")

    def vocabulary(self) -> Vocabulary:
        """The ids this config uses."""
        return Vocabulary(self.n_values, [axis.limit or axis.range[1] for axis in self.axes])


class NestedRecall(Task):
    """A table of values with keys and any number of levels of contexts; see the module."""

    def __init__(self, config: NestedConfig) -> None:
        self.config = config
        self.axes = tuple(axis.name for axis in config.axes)
        self.vocabulary = config.vocabulary()
        self.limits = self.vocabulary.limits
        self.blind = "key-majority" if len(self.axes) > 1 else None

    @property
    def vocab_size(self) -> int:
        """``Config.vocab_size``, or one more than the largest token id: 58 on the published grid."""
        return self.config.vocab_size or self.vocabulary.size

    @property
    def max_length(self) -> int:
        """Input tokens of the largest table that will be drawn: 1,057 on the published grid."""
        return self.length(tuple(axis.range[1] for axis in self.config.axes))

    def length(self, size: Size) -> int:
        """Input tokens L of a table of this size: one part is n_1 (1 + n_2 (1 + ... 2 n_keys)) tokens.

        1 + 2 parts when every cell is asked for: the last token is only a label.
        """
        told = 2 * size[-1]
        for n in reversed(size[:-1]):
            told = n * (1 + told)
        asked = told if self.config.n_queries is None else self.config.n_queries * (len(size) + 1)
        return 1 + told + asked

    def cells(self) -> list[Size]:
        """Every size that can be drawn, the keys varying fastest."""
        lows, highs = zip(*(axis.range for axis in self.config.axes), strict=True)
        shape = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
        return [tuple(low + i for low, i in zip(lows, index, strict=True)) for index in np.ndindex(*shape)]

    def batch(
        self, rng: np.random.Generator, batch_size: int, *, size: Size | None = None, split: Split | None = None
    ) -> TokenBatch:
        """``batch_size`` samples of one size, without padding.

        ``size`` lies anywhere in the id space; None draws one of ``cells()`` for the whole batch. Raises ConfigError
        for a size outside the id space or with fewer cells than queries, an empty batch, or a size too small to be
        split.
        """
        self._check_batch_size(batch_size)
        if size is None:
            sizes = self._draw_sizes(rng, 1)
        else:
            self._check_size(size)
            sizes = np.array([size], dtype=np.int64)
        return self._write(rng, np.repeat(sizes, batch_size, axis=0), split)

    def mixed_batch(self, rng: np.random.Generator, batch_size: int, *, split: Split | None = None) -> TokenBatch:
        """``batch_size`` samples, each of a size of its own, padded on the right with ``PAD`` to the longest of them.

        As in the published data, a sample that ends before the longest one keeps its last answer in the input.
        """
        self._check_batch_size(batch_size)
        return self._write(rng, self._draw_sizes(rng, batch_size), split)

    def batch_of(self, rng: np.random.Generator, sizes: Ints, *, split: Split | None = None) -> TokenBatch:
        """One sample of each of ``sizes`` (B, axes), drawn together; padded as in ``mixed_batch``."""
        for corner in (sizes.min(axis=0), sizes.max(axis=0)):
            self._check_size(tuple(corner.tolist()))
        return self._write(rng, sizes.copy(), split)

    def render(self, tokens: Ints, answers: Ints | None = None) -> str:
        """One sample (L,) as text; with ``answers`` (L,), those at the asked positions follow ``->``."""
        return self.vocabulary.render(tokens, answers)

    @property
    def oracles(self) -> Mapping[str, Oracle]:
        return nested_oracles(self)

    def told_at(self, batch: TokenBatch) -> Ints:
        """The position right after the cell's key in the first part."""
        return told_at(batch, self)

    def _check_batch_size(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"{self.config.kind}: batch_size must be at least 1, got {batch_size}")

    def _check_size(self, size: Size) -> None:
        axes, kind = self.config.axes, self.config.kind
        if len(size) != len(axes) or not all(1 <= n <= limit for n, limit in zip(size, self.limits, strict=True)):
            limits = " x ".join(f"1..{limit} {axis.name}" for axis, limit in zip(axes, self.limits, strict=True))
            options = " or ".join(dict.fromkeys(axis.limit_option for axis in axes))
            raise ConfigError(f"{kind}: size {size} is outside {limits}; raise {options}")
        if self.config.n_queries is not None and prod(size) < self.config.n_queries:
            raise ConfigError(f"{kind}: size {size} has fewer than {self.config.n_queries} cells to ask for")

    def _draw_sizes(self, rng: np.random.Generator, n: int) -> Ints:
        low, high = np.array([axis.range for axis in self.config.axes]).T
        return rng.integers(low, high, size=(n, len(low)), endpoint=True)

    def _write(self, rng: np.random.Generator, sizes: Ints, split: Split | None) -> TokenBatch:
        n_queries = self.config.n_queries
        table, ids = self._draw(rng, sizes, split)
        if n_queries is None:
            parts, roles, used = blocks.every_cell(rng, sizes, table, ids, n_parts=2)
            told, asked, asked_roles, asked_used = parts[:, 0], parts[:, 1], roles, used
        else:
            parts, roles, used = blocks.every_cell(rng, sizes, table, ids, n_parts=1)
            asked, asked_roles = blocks.some_cells(rng, sizes, table, ids, n_queries)
            told, asked_used = parts[:, 0], np.ones(asked.shape, dtype=np.bool_)

        bos, sep = np.full((2, len(sizes), 1), [[[BOS]], [[SEP]]], dtype=np.int64)
        full = np.concatenate([bos, told, sep, asked], axis=1)
        role = np.full(full.shape[1], blocks.CONTEXT, dtype=np.int8)
        role[-len(asked_roles) :] = asked_roles
        if (sizes != sizes[0]).any():
            mark = np.ones((len(sizes), 1), dtype=np.bool_)
            full, role = blocks.compact(full, role, np.concatenate([mark, used, mark, asked_used], axis=1))
        shown = np.where(role == blocks.VALUE, BLANK, full) if self.config.hide_answers else full
        mask = np.broadcast_to(role == blocks.KEY, full.shape)
        return TokenBatch(shown[:, :-1].copy(), full[:, 1:].copy(), mask[:, :-1].copy(), sizes)

    def _draw(self, rng: np.random.Generator, sizes: Ints, split: Split | None) -> tuple[Ints, list[Ints]]:
        """Tables (B, largest size) in the split, and for every axis the token ids (B, n) of its indices."""
        most = [int(n) for n in sizes.max(axis=0)]
        cell_MA, used_BM = blocks.cells_of(sizes, most)
        borders = np.cumsum([len(cell_MA), *most])[:-1]
        in_order = [np.arange(n, dtype=np.int64)[None].repeat(len(sizes), 0) for n in most]

        def draw(rows: Ints) -> Ints:
            table = rng.integers(self.config.n_values, size=(len(rows), *most)).reshape(len(rows), -1)
            if not self.config.random_ids:
                return table
            ids = [
                np.argsort(rng.random((len(rows), limit)), axis=1)[:, :n]
                for n, limit in zip(most, self.limits, strict=True)
            ]
            return np.concatenate([table, *ids], axis=1)

        def parts(drawn: Ints) -> tuple[Ints, list[Ints]]:
            if not self.config.random_ids:
                return drawn, [each[: len(drawn)] for each in in_order]
            table, *ids = np.split(drawn, borders, axis=1)
            return table, ids

        def facts(rows: Ints, drawn: Ints) -> Facts:
            table, ids = parts(drawn)
            where = [each[:, cell_MA[:, axis]] for axis, each in enumerate(ids)]
            return Facts(np.stack([*where, table], axis=-1), used_BM[rows])

        table, ids = parts(draw_in(split, len(sizes), draw, facts))
        return table.reshape(-1, *most), [each + start for each, start in zip(ids, self.vocabulary.first, strict=True)]
