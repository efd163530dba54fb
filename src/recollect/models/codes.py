"""Codes for symbols and hash planes for pairs of them: seeded draws that are checked, so that nothing is left to luck.

What ``models.constructed`` is built from. A random draw has the wanted property with fair probability; it is drawn
again until it has, and what cannot have it is an error at construction instead of a wrong answer later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

OVERLAP = 0.6
"""Largest inner product of two codes of one vocabulary."""
MARGIN = 1e-5
"""Least distance of any vector that is hashed from any plane's zero: ten times what float32 sums can be off by."""
FLAG = 0.5
"""Size of the flags beside unit-norm codes: large enough for attention to tell them, small enough for the hash."""
DRAWS = 256
"""Draws of codes, of a plane, or of all planes, before giving up."""


def log2_ceil(n: int) -> int:
    """Bits that number ``n`` things: ceil(log2 n)."""
    return (n - 1).bit_length()


def code_width(n_symbols: int) -> int:
    """Coordinates of a code, 4 ceil(log2 n) + 4: by Gilbert and Varshamov's bound 3.6 log2 n would do for large n."""
    return 4 * log2_ceil(n_symbols) + 4


def draw_codes(rng: np.random.Generator, n_symbols: int, *, numbered: bool = False) -> Floats:
    """Unit vectors (n_symbols, ``code_width``) with entries +-1/sqrt(width), no two with a product above ``OVERLAP``.

    Chosen one after the other; a candidate too near to an earlier code is dropped. ``numbered``: the first
    ``log2_ceil(n_symbols)`` signs are the symbol's number in binary. O(n^2 log n) time. Raises ConfigError if
    candidates run out.
    """
    width, n_digits = code_width(n_symbols), log2_ceil(n_symbols)
    chosen = np.zeros((n_symbols, width))
    n = 0
    for _ in range(DRAWS * n_symbols + DRAWS):
        candidate = rng.choice([-1.0, 1.0], size=width) / math.sqrt(width)
        if numbered:
            digits = n >> np.arange(n_digits, dtype=np.int64) & 1
            candidate[:n_digits] = (2.0 * digits - 1) / math.sqrt(width)
        if not n or (chosen[:n] @ candidate).max() <= OVERLAP + 1e-9:
            chosen[n] = candidate
            n += 1
        if n == n_symbols:
            return chosen.astype(np.float32).astype(np.float64)
    raise ConfigError(f"no {n_symbols} codes of width {width} are far enough apart; take another seed")


def overlap(codes: Floats) -> float:
    """The largest inner product of two codes; -1 for a single one."""
    products = codes @ codes.T
    np.fill_diagonal(products, -1.0)
    return float(products.max())


class Crowd(NamedTuple):
    """How full the buckets that are asked for can get, whatever the table and the order of its telling."""

    worst: int
    mean: float


def draw_planes(
    rng: np.random.Generator, levels: Sequence[Floats], n_bits: int, n_keys: int | None
) -> tuple[Floats, Crowd]:
    """Normals of ``n_bits`` hash planes (d_key, n_bits) under which no bucket asked for ever holds above ``n_keys``
    keys of a sequence, and how many it may hold. None: whatever they hold.

    Standard normal, then made orthogonal to the mean code of every level and to equal flags: without that, tables of
    few contexts share the sign of what is common to all cells and crowd into few buckets. O(draws n log n) time for n
    cells. Raises ConfigError if ``DRAWS`` draws all crowd.
    """
    worst = 0
    for _ in range(DRAWS):
        planes = np.stack([_plane(rng, levels) for _ in range(n_bits)], axis=1)
        found = crowd(levels, planes)
        if n_keys is None or found.worst <= n_keys:
            return planes, found
        worst = found.worst if not worst else min(worst, found.worst)
    cells = " x ".join(str(len(codes)) for codes in levels)
    raise ConfigError(
        f"tables of {cells}: in {DRAWS} draws some bucket may hold {worst} keys or more, above n_keys {n_keys}; "
        "raise n_keys or n_bits"
    )


def digit_planes(levels: Sequence[Floats]) -> Floats:
    """Planes (d_key, bits) that read the binary digits of numbered codes, one coordinate each: a bucket per cell."""
    columns: list[int] = []
    start = 0
    for codes in levels:
        columns += range(start, start + log2_ceil(len(codes)))
        start += codes.shape[1]
    planes = np.zeros((start + 2, max(1, len(columns))))
    for bit, column in enumerate(columns or [0]):
        planes[column, bit] = 1.0
    return planes


def _plane(rng: np.random.Generator, levels: Sequence[Floats]) -> Floats:
    for _ in range(DRAWS):
        parts: list[Floats] = []
        for codes in levels:
            part, mean = rng.standard_normal(codes.shape[1]), codes.mean(axis=0)
            # A table of one cell has nothing but its mean, and two opposite codes have none.
            centred = math.prod(len(each) for each in levels) > 1 and mean @ mean > 0
            parts.append(part - (part @ mean) / (mean @ mean) * mean if centred else part)
        flag = rng.standard_normal()
        plane = np.concatenate([*parts, [flag, -flag]]).astype(np.float32).astype(np.float64)
        if min(float(np.abs(p).min()) for p in _projections(levels, plane[:, None])) > MARGIN:
            return plane
    raise ConfigError("no plane keeps clear of all codes; take another seed")


def crowd(levels: Sequence[Floats], planes: Floats) -> Crowd:
    """The most and the mean number of keys that can share the bucket of a told value, over all cells, at the end of a
    sequence that tells and asks every cell once, in any order of blocks and of keys in them.

    Counted are the vectors of told keys and values, of asked keys, of their answers (or, hidden, the key's vector
    again), of every opening token of a block with whatever was last written below it, of ``sep`` and of ``bos``.
    """
    n_buckets = 1 << planes.shape[1]
    digits = 1 << np.arange(planes.shape[1], dtype=np.int64)
    told_value, told_key, asked_key, asked_value, *openings, start = (
        (p > 0).astype(np.int64) @ digits for p in _projections(levels, planes)
    )

    def count(buckets: Ints) -> Ints:
        return np.bincount(buckets.ravel(), minlength=n_buckets)

    asked, answered = count(asked_key), count(asked_value)
    held = count(told_value) + count(told_key) + asked + np.maximum(asked, answered) + (asked > 0) + count(start)
    shape = [len(codes) for codes in levels]
    for level in range(1, len(levels)):
        n_prefixes = math.prod(shape[:level])
        held += count(openings[level - 1])  # before anything was written below it
        for stale in (told_key, asked_key):
            for buckets in stale.reshape(n_prefixes, -1):
                held[np.unique(buckets)] += 1
    there = held[told_value.ravel()]
    return Crowd(int(there.max()), float(there.mean()))


def _projections(levels: Sequence[Floats], planes: Floats) -> list[Floats]:
    """Of every vector that is hashed: the cells' four kinds (n_1, ..., n_w, bits) each, then block openings below which
    nothing was written, one array per level but the last, then ``bos``.
    """
    partial: list[Floats] = []
    row = 0
    grid = np.zeros(planes.shape[1])
    for codes in levels:
        grid = grid[..., None, :] + codes @ planes[row : row + codes.shape[1]]
        row += codes.shape[1]
        partial.append(grid)
    kind, part = FLAG * planes[-2], FLAG * planes[-1]
    cells = [grid + kind + part, grid - kind + part, grid - kind - part, grid + kind - part]
    return [*cells, *(p - kind + part for p in partial[:-1]), (part - kind)[None]]
