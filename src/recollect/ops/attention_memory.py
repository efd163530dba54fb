"""What causal sparse attention carries between calls: one region of slots per pattern.

A region holds the keys its pattern keeps for later queries, ordered by time, empty slots last (position -1, zeros):

* ``Window``, ``Sink``, ``Dilated``, ``KeySelection``: the pattern's ``n_keys`` slots.
* ``Lsh``: per hash round and bucket a ring of ``n_keys / n_rounds`` slots, ordered within the bucket. Its place tells a
  key's bucket.
* ``Full`` decides everything when it is among the patterns: a list that grows with the longest open segment.

A key may be held in several regions; its position within the segment tells that it is the same key. Of several copies
a query uses the one in the first region of ``regions``; gradients of the memory follow that rule too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.patterns import Full, KeySelection, Lsh, Pattern, find, memory_slots


class Memory(NamedTuple):
    """M slots in regions (see the module), or as many as the longest open segment with ``Full``."""

    k: Tensor  # (B, H, M, N)
    v: Tensor  # (B, H, M, P)
    position: Tensor  # (B, H, M) int64, within the segment; -1 in empty slots
    score: Tensor  # (B, H, n_keys of KeySelection), (B, H, 0) without it
    next_position: Tensor  # (B,) int64, within the segment


class Buckets(NamedTuple):
    """Hash buckets of queries and keys, (B, L, H, n_rounds) int64 each (``hashing.sign_buckets``)."""

    q: Tensor
    k: Tensor


class Region(NamedTuple):
    """Slots ``begin..stop`` of one pattern; an ``Lsh`` has one region per hash round."""

    pattern: Pattern
    begin: int
    stop: int
    hash_round: int = 0


def decisive(patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    """The patterns that decide: ``Full`` alone where it is given, since it admits whatever others do."""
    full = find(patterns, Full)
    return patterns if full is None else (full,)


def slot_regions(patterns: tuple[Pattern, ...]) -> tuple[Region, ...]:
    """Regions of the patterns that ignore hash buckets, in the order given; not for ``Full``."""
    found: list[Region] = []
    begin = 0
    for pattern in patterns:
        if not isinstance(pattern, Lsh):
            assert pattern.slots is not None
            found.append(Region(pattern, begin, begin + pattern.slots))
            begin += pattern.slots
    return tuple(found)


def hash_regions(patterns: tuple[Pattern, ...]) -> tuple[Region, ...]:
    """Regions of the hash rounds, after all others."""
    lsh = find(patterns, Lsh)
    if lsh is None:
        return ()
    begin = sum(region.stop - region.begin for region in slot_regions(patterns))
    width = (lsh.n_keys // lsh.n_rounds) << lsh.n_bits
    return tuple(Region(lsh, begin + r * width, begin + (r + 1) * width, r) for r in range(lsh.n_rounds))


def init_memory(
    patterns: tuple[Pattern, ...],
    batch: int,
    n_heads: int,
    d_key: int,
    d_value: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Memory:
    """A memory in which nothing is remembered. With ``Full`` it has a slot per position of the longest open segment."""
    patterns = decisive(patterns)
    slots = memory_slots(patterns) or 0
    selection = find(patterns, KeySelection)
    shape = (batch, n_heads, slots)
    return Memory(
        k=torch.zeros(*shape, d_key, device=device, dtype=dtype),
        v=torch.zeros(*shape, d_value, device=device, dtype=dtype),
        position=torch.full(shape, -1, device=device, dtype=torch.int64),
        score=torch.zeros(batch, n_heads, selection.n_keys if selection else 0, device=device, dtype=dtype),
        next_position=torch.zeros(batch, device=device, dtype=torch.int64),
    )


def memory_bytes(
    patterns: tuple[Pattern, ...], batch: int, n_heads: int, d_key: int, d_value: int, itemsize: int, seen: int
) -> int:
    """Bytes of ``Memory`` after ``seen`` positions without a reset; constant unless ``Full`` is among the patterns."""
    patterns = decisive(patterns)
    bounded = memory_slots(patterns)
    slots = seen if bounded is None else bounded
    selection = find(patterns, KeySelection)
    scores = itemsize * selection.n_keys if selection else 0
    return batch * (n_heads * (slots * (itemsize * (d_key + d_value) + 8) + scores) + 8)
