"""Solvers of joint recall that may read only part of the table: what a score has to beat before it means anything.

Each reads the tokens of the first part (before ``sep``) and, for a query, the key and the context that is being asked
for; never a label, a mask or the answers inside the second part. On the published grid they score, in per cent: uniform
6.25, frequent 11.3, last 16.4, key-majority 23.7, context-majority 23.6, perfect 100. Ties go to the smallest value,
which changes no expected score. Cost: O(B L) and one table of counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from recollect.core.seeding import Streams
from recollect.tasks.batch import Ints, TokenBatch
from recollect.tasks.joint_recall import FIRST_VALUE, PAD, SEP, JointRecall


class Pairs(NamedTuple):
    """Key tokens in reading order, as flat arrays (M,): where each stands, and the indices of its context and key."""

    row: Ints
    column: Ints
    context: Ints
    key: Ints


def uniform(batch: TokenBatch, task: JointRecall) -> Ints:
    """A value drawn anew for every query (always the same draws for a batch of the same shape)."""
    _, _, asked = read_pairs(batch, task)
    rng = Streams(0).numpy("eval", "uniform-oracle")
    return _answer(batch, asked, rng.integers(task.config.n_values, size=len(asked.row)))


def frequent(batch: TokenBatch, task: JointRecall) -> Ints:
    """The most frequent value of the whole table."""
    told, value, asked = read_pairs(batch, task)
    guess_B = _mode(batch, task, told.row, np.zeros_like(told.row), value)[:, 0]
    return _answer(batch, asked, guess_B[asked.row])


def last(batch: TokenBatch, task: JointRecall) -> Ints:
    """The value the key was given last, in whatever context."""
    told, value, asked = read_pairs(batch, task)
    table_BK = np.zeros((len(batch.tokens), task.max_keys), dtype=np.int64)
    table_BK[told.row, told.key] = value  # pairs are in reading order, and the last one assigned stays
    return _answer(batch, asked, table_BK[asked.row, asked.key])


def key_majority(batch: TokenBatch, task: JointRecall) -> Ints:
    """The most frequent value of the key over all contexts: a solver blind to contexts."""
    told, value, asked = read_pairs(batch, task)
    return _answer(batch, asked, _mode(batch, task, told.row, told.key, value)[asked.row, asked.key])


def context_majority(batch: TokenBatch, task: JointRecall) -> Ints:
    """The most frequent value in the context's block: a solver blind to keys."""
    told, value, asked = read_pairs(batch, task)
    return _answer(batch, asked, _mode(batch, task, told.row, told.context, value)[asked.row, asked.context])


def perfect(batch: TokenBatch, task: JointRecall) -> Ints:
    """The cell that is asked for."""
    told, value, asked = read_pairs(batch, task)
    table_BCK = np.zeros((len(batch.tokens), task.max_contexts, task.max_keys), dtype=np.int64)
    table_BCK[told.row, told.context, told.key] = value
    return _answer(batch, asked, table_BCK[asked.row, asked.context, asked.key])


ORACLES: dict[str, Callable[[TokenBatch, JointRecall], Ints]] = {
    "uniform": uniform,
    "frequent": frequent,
    "last": last,
    "key-majority": key_majority,
    "context-majority": context_majority,
    "perfect": perfect,
}


def read_pairs(batch: TokenBatch, task: JointRecall) -> tuple[Pairs, Ints, Pairs]:
    """The pairs of the first part, their values (M,), and the queries of the second."""
    tokens = batch.tokens
    is_context = tokens >= task.first_context
    is_key = (tokens >= task.first_key) & ~is_context
    asking = np.cumsum(tokens == SEP, axis=1) > 0
    # The context of a position is the last context token at or before it.
    positions = np.arange(tokens.shape[1], dtype=np.int64)
    latest = np.maximum.accumulate(np.where(is_context, positions, 0), axis=1)

    def pairs(row: Ints, column: Ints) -> Pairs:
        context = tokens[row, latest[row, column]] - task.first_context
        return Pairs(row, column, context, tokens[row, column] - task.first_key)

    told = pairs(*np.nonzero(is_key & ~asking))
    return told, tokens[told.row, told.column + 1] - FIRST_VALUE, pairs(*np.nonzero(is_key & asking))


def _mode(batch: TokenBatch, task: JointRecall, row: Ints, group: Ints, value: Ints) -> Ints:
    """Most frequent value (B, groups) of the pairs of each row that share a group."""
    n_groups = max(task.max_contexts, task.max_keys)
    shape = (len(batch.tokens), n_groups, task.config.n_values)
    counts = np.bincount(np.ravel_multi_index((row, group, value), shape), minlength=int(np.prod(shape)))
    return counts.reshape(shape).argmax(axis=-1)


def _answer(batch: TokenBatch, asked: Pairs, value: Ints) -> Ints:
    """Predictions (B, L): the given values at the queries, ``PAD`` elsewhere."""
    predictions = np.full(batch.tokens.shape, PAD, dtype=np.int64)
    predictions[asked.row, asked.column] = value + FIRST_VALUE
    return predictions
