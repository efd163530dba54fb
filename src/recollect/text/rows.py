"""Batches of rows of one length from a token store, every row by its number alone.

``PackedRows`` trains: documents laid end to end and cut. ``LongRows`` evaluates by position: one document per row.
Neither copies the store or keeps a place in it, so any step of any process can be made without those before it.

A row stands alone. ``reset`` is true at its first position too when a document began before it: whatever state a model
brings along belongs to another row. ``position`` tells the two kinds of beginning apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, DataError
from recollect.core.seeding import Streams
from recollect.text.store import TokenStore
from recollect.text.tokenizer import Ints

Bools: TypeAlias = npt.NDArray[np.bool_]


class PackedBatch(NamedTuple):
    """B rows of L tokens, each array (B, L) and a copy: the store stays as it is."""

    tokens: Ints
    labels: Ints
    """The token that follows in the same document, also where it lies beyond the end of the row. After the end of a
    document there is none: ``eos_id``, and ``mask`` is false."""
    mask: Bools
    """True where the label counts: everywhere but at the last token of each document."""
    reset: Bools
    """True where a document or a row begins."""
    document: Ints
    """Number in the store of the document that each token is of."""
    position: Ints
    """Position of each token in its document, from 0."""


class PackedRows:
    """Rows 0, 1, 2, ... of ``row_length`` tokens, without end: ``len(rows)`` to an epoch.

    In every epoch the chosen documents are put in an order of its own, laid end to end and cut into rows, which come in
    an order of their own too: a long document fills many rows, and they should not meet in one batch. Each token is in
    exactly one row of an epoch, except the fewer than ``row_length`` of the tail; every token but the first of each
    document is a label once. Nothing is padded.

    ``documents`` restricts to these numbers (``store.split("train")``) and ``min_length`` to documents with so many
    tokens, the end included. Without ``shuffle``, documents and rows stay in order and every epoch is the same.
    Raises ConfigError for a length below 1; DataError if no document is left, or all together are shorter than a row.
    Cost: a batch costs the bytes it copies; the first one of an epoch O(documents log documents). Memory: 24 bytes a
    document and 8 a row, for the two epochs used last.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        seed: int = 0,
        *,
        documents: npt.ArrayLike | None = None,
        min_length: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.store = store
        self.row_length = row_length
        self.documents = _chosen(store, row_length, documents, min_length)
        """(n,) numbers of the documents that rows are cut from."""
        self.n_tokens = int(store.lengths[self.documents].sum())
        """Tokens of an epoch, the tail included."""
        if self.n_tokens < row_length:
            raise DataError(
                f"{store.path}: a row of {row_length} tokens is longer than all {len(self.documents)} documents, "
                f"{self.n_tokens} tokens: choose shorter rows or more text"
            )
        self._seed, self._shuffle = seed, shuffle
        self._orders: dict[int, _Order] = {}

    def __len__(self) -> int:
        return self.n_tokens // self.row_length

    def rows(self, indices: npt.ArrayLike) -> PackedBatch:
        """Rows by number (B,): row r is row ``r % len`` of epoch ``r // len``. Raises DataError for one below 0."""
        numbers = _checked(self.store, indices, None)
        if not self._shuffle or not numbers.size:
            return self._cut(numbers % len(self), 0)
        epochs = numbers // len(self)
        if (epochs == epochs[0]).all():
            return self._cut(numbers % len(self), int(epochs[0]))
        parts = [(epochs == epoch, int(epoch)) for epoch in np.unique(epochs)]
        cut = [self._cut(numbers[here] % len(self), epoch) for here, epoch in parts]
        back = np.argsort(np.concatenate([np.flatnonzero(here) for here, _ in parts]))
        return PackedBatch(*(np.concatenate(arrays)[back] for arrays in zip(*cut, strict=True)))

    def at_step(self, step: int, batch_size: int, rank: int = 0, n_ranks: int = 1) -> PackedBatch:
        """The rows of process ``rank`` of ``n_ranks`` at a 1-based step, where all together take ``batch_size``.

        Step s takes rows (s - 1) ``batch_size`` .. s ``batch_size`` - 1, whatever the number of processes: a run that
        goes on with another number sees the same batches. Raises ConfigError where they do not divide.
        """
        if step < 1 or batch_size < 1 or not 0 <= rank < n_ranks:
            raise ConfigError(f"no batch for step {step}, batch size {batch_size}, process {rank} of {n_ranks}")
        if batch_size % n_ranks:
            raise ConfigError(f"a batch of {batch_size} rows does not divide among {n_ranks} processes")
        own = batch_size // n_ranks
        return self.rows((step - 1) * batch_size + rank * own + np.arange(own))

    def _cut(self, rows: Ints, epoch: int) -> PackedBatch:
        """Rows 0 .. len - 1 of an epoch, in the order they come in."""
        order = self._order(epoch)
        first = order.rows[rows] * self.row_length
        # Document by document: which of them, in the order of the epoch, each row takes a piece of.
        begin = np.searchsorted(order.ends, first, side="right")
        end = np.searchsorted(order.ends, first + self.row_length, side="left") + 1
        n_pieces = end - begin
        row = np.repeat(np.arange(len(rows)), n_pieces)
        place = _ranges(begin, n_pieces)
        numbers = order.documents[place]
        lengths = self.store.lengths[numbers]
        starts = order.ends[place] - lengths
        head = np.maximum(first[row] - starts, 0)
        tail = np.minimum(first[row] + self.row_length - starts, lengths)
        return _gather(self.store, _Pieces(numbers, head, tail - head), self.row_length)

    def _order(self, epoch: int) -> _Order:
        if epoch not in self._orders:
            documents, rows = self.documents, np.arange(len(self), dtype=np.int64)
            if self._shuffle:
                streams = Streams(self._seed)
                documents = streams.numpy("data", "documents", epoch).permutation(documents)
                rows = streams.numpy("data", "rows", epoch).permutation(rows)
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = _Order(documents, np.cumsum(self.store.lengths[documents]), rows)
        return self._orders[epoch]


class LongRows:
    """The first ``row_length`` tokens of every document that has as many, one document per row, in order.

    Column t of a batch is position t of a document: the mean loss of a column is the loss at that position. Raises
    ConfigError for a length below 1; DataError if no document is long enough.
    """

    def __init__(self, store: TokenStore, row_length: int, *, documents: npt.ArrayLike | None = None) -> None:
        self.store = store
        self.row_length = row_length
        self.documents = _chosen(store, row_length, documents, row_length)
        """(n,) numbers of the documents."""

    def __len__(self) -> int:
        return len(self.documents)

    def rows(self, indices: npt.ArrayLike) -> PackedBatch:
        """Rows by number (B,). Raises DataError for one outside 0 .. ``len`` - 1."""
        numbers = self.documents[_checked(self.store, indices, len(self))]
        zero = np.zeros(len(numbers), dtype=np.int64)
        return _gather(self.store, _Pieces(numbers, zero, zero + self.row_length), self.row_length)


class _Order(NamedTuple):
    """An epoch."""

    documents: Ints
    """(n,) numbers, in the order they lie in."""
    ends: Ints
    """(n,) tokens up to the end of each."""
    rows: Ints
    """(rows,) which row comes when."""


class _Pieces(NamedTuple):
    """Stretches of documents, which fill rows one after the other."""

    document: Ints
    head: Ints
    """Position in the document where each begins."""
    length: Ints


def _gather(store: TokenStore, pieces: _Pieces, row_length: int) -> PackedBatch:
    """The rows that pieces fill."""
    document, head, length = pieces
    end = np.cumsum(length)
    begin = end - length
    shape = (len(end) and int(end[-1]) // row_length, row_length)
    at = np.arange(shape[0] * row_length, dtype=np.int64)
    position = at + np.repeat(head - begin, length)
    first = store.offsets[document] + head
    tokens = store.tokens[at + np.repeat(first - begin, length)].astype(np.int64)
    labels, mask, reset = np.empty_like(tokens), np.ones(tokens.shape, np.bool_), np.zeros(tokens.shape, np.bool_)
    labels[:-1] = tokens[1:]
    # The label of the last token of a piece lies outside of it, if there is one.
    goes_on = head + length < store.lengths[document]
    labels[end[goes_on] - 1] = store.tokens[(first + length)[goes_on]]
    labels[end[~goes_on] - 1] = store.eos_id
    mask[end[~goes_on] - 1] = False
    reset[begin] = True
    document = np.repeat(document, length).reshape(shape)
    tokens, labels, position = tokens.reshape(shape), labels.reshape(shape), position.reshape(shape)
    return PackedBatch(tokens, labels, mask.reshape(shape), reset.reshape(shape), document, position)


def _ranges(begin: Ints, length: Ints) -> Ints:
    """begin[0], begin[0] + 1, ... (length[0] of them), then begin[1], ..."""
    ends = np.cumsum(length)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(begin - ends + length, length)


def _chosen(store: TokenStore, row_length: int, documents: npt.ArrayLike | None, min_length: int) -> Ints:
    if row_length < 1:
        raise ConfigError(f"row_length must be at least 1, got {row_length}")
    numbers = _checked(store, np.arange(store.n_documents) if documents is None else documents, store.n_documents)
    if not numbers.size:
        raise DataError(f"{store.path}: the set of documents to read is empty")
    lengths = store.lengths[numbers]
    if int(lengths.max()) < min_length:
        raise DataError(
            f"{store.path}: no document has {min_length} tokens, the longest has {lengths.max()}: choose a shorter "
            f"length or longer documents"
        )
    return numbers[lengths >= min_length]


def _checked(store: TokenStore, indices: Any, end: int | None) -> Ints:
    """Numbers (B,) in 0 .. ``end`` - 1."""
    numbers = np.asarray(indices, dtype=np.int64)
    if numbers.ndim != 1 or (numbers.size and (numbers.min() < 0 or (end is not None and numbers.max() >= end))):
        allowed = "from 0 on" if end is None else f"in 0..{end - 1}"
        raise DataError(f"{store.path}: numbers must be a list and lie {allowed}, got {indices}")
    return numbers
