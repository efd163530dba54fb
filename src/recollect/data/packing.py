"""Samples of different lengths as rows of one length: several to a row with resets between them, or one to a row.

``place`` decides from lengths alone where samples go; ``pack`` writes them there. Samples that find no place need not
even be drawn.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recollect.core.errors import ConfigError
from recollect.tasks.batch import PAD, Bools, Ints, TokenBatch


class Places(NamedTuple):
    """Where the first M samples of a batch lie; later ones have no place."""

    row: Ints
    """(M,)"""
    start: Ints
    """(M,) first position within the row."""
    length: Ints
    """(M,)"""
    shape: tuple[int, int]
    """Rows, and positions in each."""

    @property
    def filling(self) -> float:
        """Share of positions that carry a sample."""
        rows, row_length = self.shape
        return float(self.length.sum()) / (rows * row_length)


class PackedBatch(NamedTuple):
    """Rows of samples, each array (rows, row_length). All arrays own their memory."""

    tokens: Ints
    labels: Ints
    mask: Bools
    """True where an answer is asked for; never in padding."""
    reset: Bools
    """True at the first position of every sample, and at every position of padding: the positions of a stretch of
    padding would otherwise pass for one more sequence to the losses that layers add."""


def place(lengths: Sequence[int], row_length: int, rows: int | None = None) -> Places:
    """Best-fit decreasing: the longest sample first, each into the fullest row that has room. Deterministic.

    Without ``rows`` every sample is placed, in as few rows as this finds. With it the number of rows is fixed: the
    longest run of samples 0, 1, 2, ... that fits is placed and the rest is left out. None is passed over in favour of
    a shorter one behind it, which would teach small sizes more often than they are drawn. Time O(M (log M + rows)) a
    try, and a few tries. Raises ConfigError for a sample longer than a row, or if there is none.
    """
    _check(lengths, row_length)
    total = np.cumsum(lengths)
    n = len(lengths) if rows is None else int((total <= rows * row_length).sum())
    n_rows = -(-int(total[-1]) // row_length) if rows is None else rows
    while (placed := _best_fit(lengths[:n], row_length, n_rows)) is None:
        n, n_rows = (n, n_rows + 1) if rows is None else (n - 1, n_rows)
    at = np.array(placed, dtype=np.int64).reshape(-1, 2)
    return Places(at[:, 0], at[:, 1], np.array(lengths[:n], dtype=np.int64), (n_rows, row_length))


def one_per_row(lengths: Sequence[int], row_length: int | None = None) -> Places:
    """Every sample in a row of its own, padded to ``row_length`` or to the longest of them. Errors as ``place``."""
    _check(lengths, row_length)
    n = len(lengths)
    row, start = np.arange(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    return Places(row, start, np.array(lengths, dtype=np.int64), (n, row_length or max(lengths)))


def pack(batch: TokenBatch, places: Places) -> PackedBatch:
    """The first M samples of ``batch`` (M, L), padded or not, where ``places`` says; the rest is ``PAD``. O(M L)."""
    n, longest = len(places.length), int(places.length.max())
    offset = np.arange(longest, dtype=np.int64)
    carries = offset < places.length[:, None]
    first = places.row * places.shape[1] + places.start
    at = (first[:, None] + offset)[carries]
    tokens, labels = np.full(places.shape, PAD, dtype=np.int64), np.full(places.shape, PAD, dtype=np.int64)
    mask, reset = np.zeros(places.shape, dtype=np.bool_), np.ones(places.shape, dtype=np.bool_)
    for out, given in ((tokens, batch.tokens), (labels, batch.labels), (mask, batch.mask)):
        out.reshape(-1)[at] = given[:n, :longest][carries]
    reset.reshape(-1)[at] = False
    reset.reshape(-1)[first] = True
    return PackedBatch(tokens, labels, mask, reset)


def _check(lengths: Sequence[int], row_length: int | None) -> None:
    if not lengths:
        raise ConfigError("there is no sample to pack; give at least one")
    if row_length is not None and max(lengths) > row_length:
        raise ConfigError(f"a sample of {max(lengths)} positions does not fit a row of {row_length}; raise row_length")


def _best_fit(lengths: Sequence[int], row_length: int, rows: int) -> list[tuple[int, int]] | None:
    """(row, start) of every sample, or None if they do not fit."""
    room = [(row_length, row) for row in range(rows)]  # ascending
    placed = [(0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        i = bisect_left(room, (lengths[sample], 0))
        if i == rows:
            return None
        free, row = room.pop(i)
        placed[sample] = (row, row_length - free)
        insort(room, (free - lengths[sample], row))
    return placed
