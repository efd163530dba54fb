"""Solvers of nested recall that may read only part of the table: what a score has to beat before it means anything.

Each reads the tokens of the first part (before ``sep``) and, for a query, the key and the contexts it is asked under;
never a label, a mask or the answers inside the second part. On the published grid of joint recall they score, in per
cent: uniform 6.25, frequent 11.3, last 16.4, key-majority 23.7, context-majority 23.6, perfect 100. Ties go to the
smallest value, which changes no expected score. Cost: O(B L) and one table of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from recollect.core.seeding import Streams
from recollect.tasks.base import Oracle
from recollect.tasks.batch import PAD, Ints, TokenBatch
from recollect.tasks.vocabulary import FIRST_VALUE, SEP

if TYPE_CHECKING:
    from recollect.tasks.nested import NestedRecall

Solver: TypeAlias = "Callable[[TokenBatch, NestedRecall], Ints]"


class Pairs(NamedTuple):
    """Key tokens in reading order, as flat arrays (M,): where each stands, and its index along every axis."""

    row: Ints
    column: Ints
    path: tuple[Ints, ...]
    """Indices of the contexts, outermost first, and of the key."""


def uniform(batch: TokenBatch, task: NestedRecall) -> Ints:
    """A value drawn anew for every query (always the same draws for a batch of the same shape)."""
    asked = read_pairs(batch, task)[2]
    rng = Streams(0).numpy("eval", "uniform-oracle")
    return _answer(batch, asked, rng.integers(task.config.n_values, size=len(asked.row)))


def frequent(batch: TokenBatch, task: NestedRecall) -> Ints:
    """The most frequent value of the whole table."""
    return _majority(batch, task, ())


def last(batch: TokenBatch, task: NestedRecall) -> Ints:
    """The value the key was given last, in whatever context."""
    return _recall(batch, task, (len(task.axes) - 1,))


def key_majority(batch: TokenBatch, task: NestedRecall) -> Ints:
    """The most frequent value of the key over all contexts: a solver blind to contexts."""
    return _majority(batch, task, (len(task.axes) - 1,))


def context_majority(batch: TokenBatch, task: NestedRecall) -> Ints:
    """The most frequent value in the innermost context's block: a solver blind to keys."""
    return _majority(batch, task, range(len(task.axes) - 1))


def blind_to(level: int) -> Solver:
    """The most frequent value of the key under the other contexts: a solver blind to one level of contexts."""

    def solve(batch: TokenBatch, task: NestedRecall) -> Ints:
        return _majority(batch, task, [axis for axis in range(len(task.axes)) if axis != level])

    return solve


def perfect(batch: TokenBatch, task: NestedRecall) -> Ints:
    """The cell that is asked for."""
    return _recall(batch, task, range(len(task.axes)))


ORACLES: dict[str, Solver] = {
    "uniform": uniform,
    "frequent": frequent,
    "last": last,
    "key-majority": key_majority,
    "context-majority": context_majority,
    "perfect": perfect,
}
"""The solvers of joint recall."""


def nested_oracles(task: NestedRecall) -> Mapping[str, Oracle]:
    """The solvers that differ on this task, bound to it.

    Without contexts a key has one value, and there are three; with several levels of them, one more is blind to each.
    """
    n_levels = len(task.axes) - 1
    solvers = ORACLES if n_levels else {name: ORACLES[name] for name in ("uniform", "frequent", "perfect")}
    if n_levels > 1:
        solvers = {**solvers, **{f"blind-to-{task.axes[level]}": blind_to(level) for level in range(n_levels)}}

    def bound(solver: Solver) -> Oracle:
        return lambda batch: solver(batch, task)

    return {name: bound(solver) for name, solver in solvers.items()}


def read_pairs(batch: TokenBatch, task: NestedRecall) -> tuple[Pairs, Ints, Pairs]:
    """The pairs of the first part, their values (M,), and the queries of the second."""
    tokens, vocabulary = batch.tokens, task.vocabulary
    n_axes = len(vocabulary.first)
    positions = np.arange(tokens.shape[1], dtype=np.int64)
    # The index of a position along an axis is that of the last token of the axis at or before it.
    latest = [
        np.maximum.accumulate(np.where(vocabulary.on_axis(tokens, axis), positions, 0), axis=1)
        for axis in range(n_axes - 1)
    ]
    is_key = vocabulary.on_axis(tokens, n_axes - 1)
    asking = np.cumsum(tokens == SEP, axis=1) > 0

    def pairs(row: Ints, column: Ints) -> Pairs:
        columns = [*(each[row, column] for each in latest), column]
        path = (tokens[row, each] - first for each, first in zip(columns, vocabulary.first, strict=True))
        return Pairs(row, column, tuple(path))

    told = pairs(*np.nonzero(is_key & ~asking))
    return told, tokens[told.row, told.column + 1] - FIRST_VALUE, pairs(*np.nonzero(is_key & asking))


def _recall(batch: TokenBatch, task: NestedRecall, axes: Sequence[int]) -> Ints:
    """The value told last under the same indices along ``axes``."""
    told, value, asked = read_pairs(batch, task)
    table = np.zeros((len(batch.tokens), *(task.limits[axis] for axis in axes)), dtype=np.int64)
    # Pairs are in reading order, and the last one assigned stays.
    table[(told.row, *(told.path[axis] for axis in axes))] = value
    return _answer(batch, asked, table[(asked.row, *(asked.path[axis] for axis in axes))])


def told_at(batch: TokenBatch, task: NestedRecall) -> Ints:
    """Where the value of the cell that each position asks for was told, (B, L), -1 where nothing is asked."""
    told, _, asked = read_pairs(batch, task)
    place = np.zeros((len(batch.tokens), *task.limits), dtype=np.int64)
    place[(told.row, *told.path)] = told.column + 1
    found = np.full(batch.tokens.shape, -1, dtype=np.int64)
    found[asked.row, asked.column] = place[(asked.row, *asked.path)]
    return found


def _majority(batch: TokenBatch, task: NestedRecall, axes: Sequence[int]) -> Ints:
    """The most frequent value told under the same indices along ``axes``."""
    told, value, asked = read_pairs(batch, task)
    shape = (len(batch.tokens), *(task.limits[axis] for axis in axes), task.config.n_values)
    cell = np.ravel_multi_index((told.row, *(told.path[axis] for axis in axes), value), shape)
    most = np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape).argmax(axis=-1)
    return _answer(batch, asked, most[(asked.row, *(asked.path[axis] for axis in axes))])


def _answer(batch: TokenBatch, asked: Pairs, value: Ints) -> Ints:
    """Predictions (B, L): the given values at the queries, ``PAD`` elsewhere."""
    predictions = np.full(batch.tokens.shape, PAD, dtype=np.int64)
    predictions[asked.row, asked.column] = value + FIRST_VALUE
    return predictions
