"""The one place that picks between executions of an op, and can say why."""

from __future__ import annotations

from typing import NamedTuple

from recollect.ops.patterns import Pattern, key_budget

DENSE_SOURCES = 256
"""Below this many sources one L x S product beats the bookkeeping of tiles on a CPU (``bench/bench_attention.py``)."""


class Choice(NamedTuple):
    """An execution and the reason it was picked."""

    path: str
    why: str


def explain_sparse_attention(length: int, n_memory: int, patterns: tuple[Pattern, ...]) -> Choice:
    """Which execution ``ops.sparse_attention`` takes for ``length`` queries after ``n_memory`` remembered keys."""
    sources = length + n_memory
    if length == 1:
        return Choice("dense", "one query: its row is the whole work")
    if sources <= DENSE_SOURCES:
        return Choice("dense", f"{sources} sources, at most {DENSE_SOURCES}: one masked product is fastest")
    budget = key_budget(patterns)
    if budget is None:
        return Choice("tiled", "full attention in blocks of queries, recomputed in backward")
    return Choice("tiled", f"{sources} sources, {budget} keys per query: tiles of matrix products")


def sparse_attention_path(length: int, n_memory: int, patterns: tuple[Pattern, ...]) -> str:
    """The path of ``explain_sparse_attention``."""
    return explain_sparse_attention(length, n_memory, patterns).path
