"""Samples of nested recall as arrays: blocks within blocks, laid out for a whole batch at once.

Tables are (B, n_0, .., n_w): contexts outermost first, keys last. A batch of mixed sizes is laid out at the largest,
and ``compact`` cuts out of every row what it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.tasks.batch import PAD, Bools, Ints
from recollect.tasks.vocabulary import FIRST_VALUE

Roles: TypeAlias = npt.NDArray[np.int8]
CONTEXT, KEY, VALUE = 0, 1, 2
"""Roles of tokens. ``bos``, ``sep`` and padding count as contexts."""


def every_cell(
    rng: np.random.Generator, sizes: Ints, table: Ints, ids: Sequence[Ints], n_parts: int
) -> tuple[Ints, Roles, Bools]:
    """Parts (B, parts, T) that name every cell, the roles (T,) of their tokens, and which a sample needs (B, T)."""
    B, most, n_axes = len(table), table.shape[1:], table.ndim - 1
    orders = [
        _permutations(rng.random((B, n_parts, *most[: a + 1])), sizes[:, a].reshape(B, *[1] * (a + 2)))
        for a in range(n_axes)
    ]
    rows = _behind(np.arange(B, dtype=np.int64), n_axes + 1)
    path = tuple(_behind(order, n_axes - 1 - a) for a, order in enumerate(orders))
    shown = [ids[a][_behind(np.arange(B, dtype=np.int64), a + 2), order] for a, order in enumerate(orders)]
    tokens = _nest(shown[:-1], np.stack([shown[-1], table[(rows, *path)] + FIRST_VALUE], axis=-1))

    roles = _nest(
        [np.full(most[: a + 1], CONTEXT, dtype=np.int8) for a in range(n_axes - 1)],
        np.broadcast_to(np.array([KEY, VALUE], dtype=np.int8), (*most, 2)),
    )
    needed: list[Bools] = []
    for a, n in enumerate(most):
        within = (np.arange(n, dtype=np.int64) < sizes[:, a, None]).reshape(B, *[1] * a, n)
        needed.append(needed[-1][..., None] & within if needed else within)
    return tokens, roles, _nest(needed[:-1], np.stack([needed[-1]] * 2, axis=-1))


def some_cells(rng: np.random.Generator, sizes: Ints, table: Ints, ids: Sequence[Ints], n: int) -> tuple[Ints, Roles]:
    """``n`` distinct cells of every sample, drawn at random, as contexts, key and value: tokens (B, T), roles (T,)."""
    B, most = len(table), table.shape[1:]
    _, used_BM = cells_of(sizes, most)
    noise = np.where(used_BM, rng.random(used_BM.shape), 2.0)
    path = np.unravel_index(np.argsort(noise, axis=1)[:, :n], most)
    rows = np.arange(B, dtype=np.int64)[:, None]
    shown = [each[rows, index] for each, index in zip(ids, path, strict=True)]
    tokens = np.stack([*shown, table[(rows, *path)] + FIRST_VALUE], axis=-1)
    roles = np.array([*[CONTEXT] * (len(most) - 1), KEY, VALUE], dtype=np.int8)
    return tokens.reshape(B, -1), np.tile(roles, tokens.shape[1])


def cells_of(sizes: Ints, most: Sequence[int]) -> tuple[Ints, Bools]:
    """Indices (M, axes) of all cells of the largest table, and which of them each sample has (B, M)."""
    cell_MA = np.indices(most).reshape(len(most), -1).T
    return cell_MA, np.logical_and.reduce(cell_MA < sizes[:, None], axis=-1)


def compact(tokens: Ints, roles: Roles, keep: Bools) -> tuple[Ints, Roles]:
    """What is kept of every row (B, T), in order, with ``PAD`` on the right to the longest; ``roles`` is (T,)."""
    lengths = keep.sum(axis=1)
    kept = np.arange(lengths.max(), dtype=np.int64) < lengths[:, None]
    short, short_roles = np.full(kept.shape, PAD, dtype=np.int64), np.full(kept.shape, CONTEXT, dtype=np.int8)
    short[kept] = tokens[keep]
    short_roles[kept] = np.broadcast_to(roles, keep.shape)[keep]
    return short, short_roles


def _permutations(noise: npt.NDArray[np.float64], n: Ints) -> Ints:
    """Along the last axis, a random permutation of 0..n-1 followed by the rest."""
    return np.argsort(np.where(np.arange(noise.shape[-1], dtype=np.int64) < n, noise, 2.0), axis=-1)


def _behind(array: Ints, n: int) -> Ints:
    """The array with ``n`` more axes of length 1 at its end."""
    return array[(..., *[None] * n)]


def _nest(heads: Sequence[npt.NDArray[Any]], leaves: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lay out blocks: heads[a] (..., n_0..n_a) stands before what is below it, leaves (..., n_0..n_w, 2) at the end."""
    below = leaves.reshape(*leaves.shape[:-2], -1)
    for head in reversed(heads):
        below = np.concatenate([head[..., None], below], axis=-1)
        below = below.reshape(*below.shape[:-2], -1)
    return below
