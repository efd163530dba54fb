"""Packed rows: every token once an epoch, no row shows two documents as one, and any row can be made alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.core.errors import ConfigError, DataError
from recollect.text.rows import LongRows, PackedBatch, PackedRows
from recollect.text.store import TokenStore, build_store
from recollect.text.tokenizer import ByteTokenizer

EOS = 1_000_000


def numbered(lengths: list[int], path: str = "store") -> TokenStore:
    """A store whose n-th token is n: a token tells where it is from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    meta = {
        "tokenizer": {"name": "numbers", "fingerprint": "0", "vocab_size": EOS + 1, "eos_id": EOS},
        "settings": {"valid_share": 0.25, "seed": 0},
    }
    return TokenStore(Path(path), meta, np.arange(offsets[-1], dtype=np.uint32), offsets)


def check(batch: PackedBatch, store: TokenStore) -> None:
    """Each stretch between resets is a slice of one document; labels and marks say what the store says."""
    ends = store.offsets[1:]
    for tokens, labels, mask, reset, document, position in zip(*batch, strict=True):
        assert reset[0]
        for piece in np.split(np.arange(len(tokens)), np.flatnonzero(reset)[1:]):
            here = tokens[piece]
            assert np.array_equal(here, here[0] + np.arange(len(here)))
            owners = np.searchsorted(ends, here, side="right")
            assert len(set(owners.tolist())) == 1
            assert (document[piece] == owners[0]).all()
            assert np.array_equal(position[piece], here - store.offsets[owners[0]])
        # A reset inside a row is where a document begins, and every document that begins there has one.
        assert np.array_equal(reset[1:], position[1:] == 0)
        is_last = np.isin(tokens, ends - 1)
        assert np.array_equal(mask, ~is_last)
        assert np.array_equal(labels, np.where(is_last, EOS, tokens + 1))


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 50), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_token_once(lengths: list[int], row_length: int, seed: int, shuffle: bool) -> None:
    store = numbered(lengths)
    row_length = min(row_length, store.n_tokens)
    rows = PackedRows(store, row_length, seed, shuffle=shuffle)
    assert len(rows) == store.n_tokens // row_length
    for epoch in (0, 1):
        batch = rows.rows(epoch * len(rows) + np.arange(len(rows)))
        assert all(array.shape == (len(rows), row_length) for array in batch)
        assert len(np.unique(batch.tokens)) == batch.tokens.size > store.n_tokens - row_length
        check(batch, store)


def test_unshuffled_rows_are_the_store_cut() -> None:
    store = numbered([3, 4, 1, 6])
    batch = PackedRows(store, 5, shuffle=False).rows([0, 1, 2])
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert batch.labels[:2].tolist() == [[1, 2, EOS, 4, 5], [6, EOS, EOS, 9, 10]]
    assert batch.mask[:2].tolist() == [[True, True, False, True, True], [True, False, False, True, True]]
    assert batch.reset[:2].tolist() == [[True, False, False, True, False], [True, False, True, True, False]]
    assert batch.document[:2].tolist() == [[0, 0, 0, 1, 1], [1, 1, 2, 3, 3]]
    assert batch.position[:2].tolist() == [[0, 1, 2, 0, 1], [2, 3, 0, 0, 1]]
    assert [array.dtype.str for array in batch] == ["<i8", "<i8", "|b1", "|b1", "<i8", "<i8"]


@given(LENGTHS, st.integers(1, 20), st.data())
def test_any_row_can_be_made_alone(lengths: list[int], row_length: int, data: st.DataObject) -> None:
    store = numbered(lengths)
    row_length = min(row_length, store.n_tokens)
    rows = PackedRows(store, row_length, 5)
    indices = data.draw(st.lists(st.integers(0, 4 * len(rows)), max_size=8))
    together = rows.rows(indices)
    assert together.tokens.shape == (len(indices), row_length)
    check(together, store)
    for i, index in enumerate(indices):
        alone = PackedRows(store, row_length, 5).rows([index])
        assert all(np.array_equal(a[i], b[0]) for a, b in zip(together, alone, strict=True))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    store = numbered([7] * 100)
    tokens = {}
    for seed in (0, 1):
        rows = PackedRows(store, 10, seed)
        for epoch in (0, 1):
            batch = rows.rows(epoch * len(rows) + np.arange(len(rows)))
            tokens[seed, epoch] = batch.tokens.tolist()
            # Documents that meet in a row, and rows that follow one another, are not neighbours in the store.
            together = np.abs(np.diff(batch.document[batch.mask[:, 0]], axis=1))
            assert (together > 3).sum() > 10 * (together == 1).sum()
    assert len({str(value) for value in tokens.values()}) == 4


def test_a_long_document_does_not_fill_a_batch() -> None:
    """Its rows are spread over the epoch, not dealt out one after the other."""
    rows = PackedRows(numbered([6400, *[10] * 640]), 64, 0)
    from_the_long_one = (rows.rows(np.arange(200)).document == 0).mean(axis=1) > 0.5
    per_batch = from_the_long_one.reshape(20, 10).sum(axis=1)
    assert from_the_long_one.sum() in (99, 100)
    assert per_batch.max() <= 9
    assert per_batch.min() >= 1


def test_the_order_is_the_same_in_every_version() -> None:
    """A run that goes on with a newer version must see what it would have seen."""
    rows = PackedRows(numbered([5, 2, 8, 3, 6]), 6, 11)
    assert rows.rows([0, 3, 6, 9]).tokens[:, 0].tolist() == [4, 13, 18, 16]


def test_a_step_is_shared_among_processes() -> None:
    store = numbered([11, 5, 30, 8, 2, 90])
    rows = PackedRows(store, 7, 3)
    for step in (1, 2, 9):
        whole = rows.at_step(step, 12)
        assert np.array_equal(whole.tokens, rows.rows(np.arange((step - 1) * 12, step * 12)).tokens)
        for n_ranks in (2, 3, 12):
            parts = [PackedRows(store, 7, 3).at_step(step, 12, rank, n_ranks) for rank in range(n_ranks)]
            for whole_array, *pieces in zip(whole, *parts, strict=True):
                assert np.array_equal(whole_array, np.concatenate(pieces))
    with pytest.raises(ConfigError, match="a batch of 12 rows does not divide among 5 processes"):
        rows.at_step(1, 12, 0, 5)
    for step, size, rank, n_ranks in ((0, 12, 0, 1), (1, 0, 0, 1), (1, 12, 2, 2)):
        with pytest.raises(ConfigError, match="no batch for step"):
            rows.at_step(step, size, rank, n_ranks)


def test_documents_can_be_chosen() -> None:
    store = numbered([4, 9, 2, 9, 5, 8, 3, 7])
    train, valid = store.split("train"), store.split("valid")
    assert len(valid) > 0
    for part in (train, valid):
        rows = PackedRows(store, 3, documents=part)
        batch = rows.rows(np.arange(len(rows)))
        check(batch, store)
        assert set(batch.document.ravel()) <= set(part.tolist())
        assert rows.n_tokens == store.lengths[part].sum()
    long = PackedRows(store, 3, min_length=7)
    assert long.documents.tolist() == [1, 3, 5, 7]
    assert set(long.rows(np.arange(len(long))).document.ravel()) == {1, 3, 5, 7}
    assert PackedRows(store, 3, documents=[2, 3, 4], min_length=5).documents.tolist() == [3, 4]


def test_long_rows_are_the_beginnings_of_long_documents() -> None:
    store = numbered([4, 9, 6, 5, 8])
    rows = LongRows(store, 6)
    assert rows.documents.tolist() == [1, 2, 4]
    batch = rows.rows([0, 1, 2])
    check(batch, store)
    assert batch.tokens[:, 0].tolist() == [4, 13, 24]
    assert batch.mask.sum(axis=1).tolist() == [6, 5, 6]
    assert (batch.position == np.arange(6)).all()
    assert batch.reset.sum() == 3
    assert rows.rows([2, 0]).document[:, 0].tolist() == [4, 1]
    assert LongRows(store, 6, documents=[0, 2]).documents.tolist() == [2]
    assert rows.rows([]).tokens.shape == (0, 6)
    with pytest.raises(DataError, match=r"numbers must be a list and lie in 0\.\.2, got \[3\]"):
        rows.rows([3])


def test_what_cannot_be_cut_is_told_in_one_line() -> None:
    store = numbered([4, 9, 6])
    cases: list[tuple[type[Exception], str, Any]] = [
        (DataError, "a row of 20 tokens is longer than all 3 documents, 19 tokens", lambda: PackedRows(store, 20)),
        (DataError, "a row of 10 tokens is longer than all 1 doc", lambda: PackedRows(store, 10, documents=[1])),
        (DataError, "the set of documents to read is empty", lambda: PackedRows(store, 2, documents=[])),
        (DataError, r"lie in 0\.\.2, got \[3\]", lambda: PackedRows(store, 2, documents=[3])),
        (
            DataError,
            "no document has 10 tokens, the longest has 9: choose",
            lambda: PackedRows(store, 2, min_length=10),
        ),
        (DataError, "no document has 10 tokens, the longest has 9: choose", lambda: LongRows(store, 10)),
        (ConfigError, "row_length must be at least 1, got 0", lambda: PackedRows(store, 0)),
        (ConfigError, "row_length must be at least 1, got -1", lambda: LongRows(store, -1)),
        (DataError, r"must be a list and lie from 0 on, got \[-1\]", lambda: PackedRows(store, 2).rows([-1])),
        (DataError, "must be a list", lambda: PackedRows(store, 2).rows(3)),
    ]
    for kind, why, make in cases:
        with pytest.raises(kind, match=why) as error:
            make()
        assert "\n" not in str(error.value)


def test_batches_are_copies_and_only_two_epochs_are_kept() -> None:
    store = numbered([10, 10])
    rows = PackedRows(store, 4, shuffle=False)
    batch = rows.rows([0])
    for array in batch:
        assert array.flags.writeable
        assert not np.shares_memory(array, store.tokens)
        array[...] = 0
    assert rows.rows([0]).tokens.tolist() == [[0, 1, 2, 3]]
    shuffled = PackedRows(store, 4)
    for step in range(1, 30):
        shuffled.at_step(step, 3)
    assert len(shuffled._orders) <= 2


def test_text_goes_through_from_the_file_to_the_row(tmp_path: Path) -> None:
    texts = [f"text {i}: " + "wörter " * (i % 40) for i in range(300)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    store = build_store(tmp_path / "a.txt", tmp_path / "store", ByteTokenizer(), split_on="blank-lines")
    rows = PackedRows(store, 128, 0)
    batch = rows.rows(np.arange(len(rows)))
    ends = batch.tokens == 256
    assert np.array_equal(~batch.mask, ends)
    assert np.array_equal(batch.reset[:, 1:], ends[:, :-1])
    words = [text.encode() for text in texts]
    pieces = 0
    for tokens, reset, document, position in zip(
        batch.tokens, batch.reset, batch.document, batch.position, strict=True
    ):
        for piece in np.split(np.arange(128), np.flatnonzero(reset)[1:]):
            text = bytes(tokens[piece][tokens[piece] < 256].tolist())
            start = int(position[piece[0]])
            assert words[document[piece[0]]][start : start + len(text)] == text
            pieces += 1
    assert pieces > 300
