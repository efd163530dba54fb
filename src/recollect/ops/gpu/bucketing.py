"""Elements by (hash bucket, time), and which sorted keys a tile of sorted queries meets, without host syncs.

A counting sort in three launches: bucket counts of every block of ``BLOCK`` elements; per row their prefix sums over
buckets and blocks; then every block sorts its elements in registers by (bucket, time) and puts them where the sums say.
It reads 4 bytes of code twice and writes 4 of order per element, beside 16 G / BLOCK bytes of counts, and the places
where buckets begin come with it. A radix sort, which is taken from ``SORTED`` buckets on, moves 12 bytes of key and
index in and out for every 8 bits of a 32-bit key, row after row.

Buckets of a row are told apart by position only, so rows may be batch rows, heads and hash rounds alike. A tile is C
places of the order that start at its bucket's first; every bucket has ceil(n / C) of them, and tables of tiles have as
many entries as there can be at most. Tiles hold what came before at the same places whatever comes after.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from recollect.ops.patterns import HashRule

BLOCK = 1024
"""Elements that one program counts or sorts."""
SORTED = 2048
"""Buckets from which on a radix sort is taken: counts per block would outweigh the elements."""
LOOKED_UP = 128
"""Tiles or queries whose ranges one program looks up."""
WIDEST = 4096
"""Columns of the argmax rule that fit into the registers of a program."""


class Sorted(NamedTuple):
    """The elements of every row by (bucket, time), all int32. G buckets, tiles of ``tile`` places."""

    order: Tensor
    """(R, S): the element at every place; those without a bucket last."""
    start: Tensor
    """(R, G + 1): place of every bucket's first element, then how many elements have a bucket."""
    first_tile: Tensor
    """(R, G + 1): number of every bucket's first tile, then how many tiles there are."""
    tile: int


class Tiles(NamedTuple):
    """The tiles of one side, queries or keys, and the places of the other side that they meet: (R, T) int32 each."""

    bucket: Tensor
    first: Tensor
    """Place of the first element."""
    filled: Tensor
    """Elements: 1 to ``tile``, 0 in spare entries, which stand last."""
    begin: Tensor
    """First place of the other side that some element meets,"""
    end: Tensor
    """and the place after the last; at most ``begin`` if there is none."""


def n_tiles(size: int, n_buckets: int, tile: int) -> int:
    """The most tiles that ``size`` elements can take up: sum of ceil(n / C) over at most min(G, size) buckets."""
    return (size + min(n_buckets, size) * (tile - 1)) // tile


def sort_by_bucket(code_RS: Tensor, n_buckets: int, tile: int, valid_RS: Tensor | None = None) -> Sorted:
    """Sort every row by (bucket, time), stably. ``code_RS`` int in [0, n_buckets); ``valid_RS`` False: no bucket."""
    rows, size = code_RS.shape
    code = code_RS if valid_RS is None else torch.where(valid_RS, code_RS, n_buckets)
    code = code.to(torch.int32).contiguous()
    if n_buckets >= SORTED:
        return _radix_sorted(code, n_buckets, tile)
    # One more bucket for elements without one, in a power of two of them.
    width = max(16, triton.next_power_of_2(n_buckets + 1))
    block = min(BLOCK, max(16, triton.next_power_of_2(size)))
    blocks = triton.cdiv(size, block)
    count, place = (torch.empty(rows, blocks, width, dtype=torch.int32, device=code.device) for _ in range(2))
    start, first_tile = (torch.empty(rows, n_buckets + 1, dtype=torch.int32, device=code.device) for _ in range(2))
    order = torch.empty_like(code)
    _count[rows, blocks](code, count, size, n_buckets, block, width, num_warps=4)
    together = min(max(1, 8192 // width), triton.next_power_of_2(blocks))
    _offsets[rows,](count, place, start, first_tile, blocks, n_buckets, tile, together, width, num_warps=8)
    _scatter[rows, blocks](code, place, start, order, size, n_buckets, block, width, num_warps=4)
    return Sorted(order, start, first_tile, tile)


def _radix_sorted(code_RS: Tensor, n_buckets: int, tile: int) -> Sorted:
    code, order = code_RS.sort(dim=1, stable=True)
    bounds = torch.arange(n_buckets + 1, dtype=torch.int32, device=code.device).expand(code.shape[0], -1).contiguous()
    start = torch.searchsorted(code, bounds, out_int32=True)
    tiles = (start[:, 1:] - start[:, :-1] + (tile - 1)) // tile
    first_tile = F.pad(tiles.cumsum(1, dtype=torch.int32), (1, 0))
    return Sorted(order.to(torch.int32), start, first_tile, tile)


def query_tiles(queries: Sorted, keys: Sorted, n_memory: int, n_keys: int) -> Tiles:
    """Tiles of sorted queries and the places of sorted keys that they meet.

    Query i meets the ``n_keys`` latest keys of its bucket that arrived by i; key s arrives at s - ``n_memory``.
    """
    return _meeting(queries, keys, n_memory, n_keys, of_keys=False)


def key_tiles(queries: Sorted, keys: Sorted, n_memory: int, n_keys: int) -> Tiles:
    """Tiles of sorted keys and the places of sorted queries that meet them, as ``query_tiles`` has it."""
    return _meeting(queries, keys, n_memory, n_keys, of_keys=True)


def _meeting(queries: Sorted, keys: Sorted, n_memory: int, n_keys: int, *, of_keys: bool) -> Tiles:
    tiled = keys if of_keys else queries
    rows, size = tiled.order.shape
    n_buckets = tiled.start.shape[1] - 1
    most = n_tiles(size, n_buckets, tiled.tile)
    fields = torch.empty(5, rows, most, dtype=torch.int32, device=tiled.order.device)
    _tile_ranges[rows, triton.cdiv(most, LOOKED_UP)](
        *queries[:2],
        *keys[:2],
        tiled.first_tile,
        fields,
        most,
        queries.order.shape[1],
        keys.order.shape[1],
        n_buckets,
        n_buckets.bit_length(),
        max(queries.order.shape[1], keys.order.shape[1]).bit_length(),
        n_memory,
        n_keys,
        tiled.tile,
        of_keys,
        LOOKED_UP,
        num_warps=4,
    )
    return Tiles(*fields.unbind(0))


def key_ranges(queries: Sorted, keys: Sorted, n_memory: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """For the query at every place the places [low, high) of the keys it meets, (R, L) int32 each.

    All queries have a bucket. See ``query_tiles``.
    """
    rows, length = queries.order.shape
    n_buckets = queries.start.shape[1] - 1
    low, high = torch.empty_like(queries.order), torch.empty_like(queries.order)
    _query_ranges[rows, triton.cdiv(length, LOOKED_UP)](
        *queries[:2],
        *keys[:2],
        low,
        high,
        length,
        keys.order.shape[1],
        n_buckets,
        n_buckets.bit_length(),
        keys.order.shape[1].bit_length(),
        n_memory,
        n_keys,
        LOOKED_UP,
        num_warps=4,
    )
    return low, high


def bucket_deaths(
    code_RS: Tensor,
    valid_RS: Tensor,
    end_RS: Tensor,
    n_memory: int,
    n_keys: int,
    n_buckets: int,
    keys: Sorted | None = None,
) -> Tensor:
    """``lifetimes.bucket_deaths``, (R, S) int64: a key dies at its segment's end, or as the ``n_keys``-th after it in
    its bucket arrives. ``keys``: ``sort_by_bucket`` of the same codes, if there is one already. Moves 24 bytes a key.
    """
    keys = sort_by_bucket(code_RS, n_buckets, 1, valid_RS) if keys is None else keys
    rows, size = keys.order.shape
    death = torch.empty(rows, size, dtype=torch.int64, device=code_RS.device)
    block = min(BLOCK, max(16, triton.next_power_of_2(size)))
    _evictions[rows, triton.cdiv(size, block)](
        keys.order,
        keys.start,
        code_RS.to(torch.int32).contiguous(),
        end_RS.contiguous(),
        death,
        size,
        n_buckets,
        n_memory,
        n_keys,
        block,
        num_warps=4,
    )
    return death


@torch.no_grad()
def read_buckets(code_BLHRC: Tensor, rule: HashRule) -> Tensor:
    """``hashing.read_buckets``, (B, L, H, n_rounds) int64, in one reading of the projections: their bytes and 8."""
    code = code_BLHRC.contiguous()
    planes = code.shape[-1]
    if planes > WIDEST:
        return code.argmax(-1)
    bucket = torch.empty(code.shape[:-1], dtype=torch.int64, device=code.device)
    width = triton.next_power_of_2(planes)
    together = max(1, 4096 // width)
    _read[triton.cdiv(bucket.numel(), together),](
        code, bucket, bucket.numel(), planes, rule == "argmax", together, width, num_warps=4
    )
    return bucket


@triton.jit
def _read(code, bucket, size, planes, ARGMAX: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The signs of every row of projections as a binary number, or the place of the largest, the first of equals."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.arange(0, WIDTH)
    inside = at[:, None] * planes + plane[None, :]
    there = (at[:, None] < size) & (plane[None, :] < planes)
    if ARGMAX:
        x = tl.load(code + inside, mask=there, other=float("-inf")).to(tl.float32)
        value = tl.argmax(x, 1)
    else:
        x = tl.load(code + inside, mask=there, other=0).to(tl.float32)
        value = tl.sum((x > 0).to(tl.int32) << plane[None, :], 1)
    tl.store(bucket + at, value.to(tl.int64), mask=at < size)


@triton.jit
def _count(code, count, size, n_buckets, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """count (R, blocks, WIDTH): elements of every bucket in every block; bucket G holds those without."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    # What is beyond the row counts as without a bucket, after all others.
    bucket = tl.load(code + row * size + at, mask=at < size, other=n_buckets)
    counts = tl.histogram(bucket, WIDTH)
    tl.store(count + (row * tl.num_programs(1) + block) * WIDTH + tl.arange(0, WIDTH), counts)


@triton.jit
def _offsets(
    count,
    place,
    start,
    first_tile,
    blocks,
    n_buckets,
    tile,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where every bucket begins in its row, and what to add to an element's place in its sorted block, less that start.

    place (R, blocks, WIDTH): elements of a bucket in earlier blocks, less those of lower buckets in this block.
    """
    row = tl.program_id(0).to(tl.int64)
    bucket, nth = tl.arange(0, WIDTH), tl.arange(0, TOGETHER)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, blocks, TOGETHER):
        at = (row * blocks + first + nth[:, None]) * WIDTH + bucket[None, :]
        inside = (first + nth[:, None] < blocks) & (bucket[None, :] >= 0)
        counts = tl.load(count + at, mask=inside, other=0)
        earlier = total[None, :] + tl.cumsum(counts, 0) - counts
        lower = tl.cumsum(counts, 1) - counts
        tl.store(place + at, earlier - lower, mask=inside)
        total += tl.sum(counts, 0)
    begin = tl.cumsum(total, 0) - total
    tiles = tl.where(bucket < n_buckets, (total + tile - 1) // tile, 0)
    tl.store(start + row * (n_buckets + 1) + bucket, begin, mask=bucket <= n_buckets)
    tl.store(first_tile + row * (n_buckets + 1) + bucket, tl.cumsum(tiles, 0) - tiles, mask=bucket <= n_buckets)


@triton.jit
def _scatter(code, place, start, order, size, n_buckets, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """order (R, S) from the elements of a block, sorted here by (bucket, time)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nth = tl.arange(0, BLOCK)
    at = block * BLOCK + nth
    bucket = tl.load(code + row * size + at, mask=at < size, other=n_buckets)
    packed = tl.sort(bucket * BLOCK + nth)
    bucket, element = packed // BLOCK, block * BLOCK + packed % BLOCK
    to = nth + tl.load(start + row * (n_buckets + 1) + bucket)
    to += tl.load(place + (row * tl.num_programs(1) + block) * WIDTH + bucket)
    tl.store(order + row * size + to, element, mask=element < size)


@triton.jit
def _first_not_below(values, low, high, target, steps):
    """First place of ascending ``values`` in [low, high) that is at least ``target``, else ``high``."""
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(values + middle, mask=searching, other=0) < target
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
    return low


@triton.jit
def _tile_ranges(
    q_order,
    q_start,
    k_order,
    k_start,
    first_tile,
    fields,
    most,
    length,
    sources,
    n_buckets,
    bucket_steps,
    steps,
    n_memory,
    n_keys,
    tile,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fields (5, R, T): those of ``Tiles``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q_order += row * length
    k_order += row * sources
    q_start += row * (n_buckets + 1)
    k_start += row * (n_buckets + 1)
    first_tile += row * (n_buckets + 1)
    spare = at >= tl.load(first_tile + n_buckets)
    none = tl.zeros((BLOCK,), tl.int32)
    # The last bucket whose first tile is not after this one: empty buckets share their first tile with the next.
    bucket = _first_not_below(first_tile + 1, none, none + n_buckets, at + 1, bucket_steps)
    bucket = tl.minimum(bucket, n_buckets - 1)
    q_low, q_high = tl.load(q_start + bucket), tl.load(q_start + bucket + 1)
    k_low, k_high = tl.load(k_start + bucket), tl.load(k_start + bucket + 1)
    nth = at - tl.load(first_tile + bucket)
    first = nth * tile + (k_low if OF_KEYS else q_low)
    count = tl.minimum((k_high if OF_KEYS else q_high) - first, tile)
    if OF_KEYS:
        arrival = tl.load(k_order + first, mask=~spare, other=0) - n_memory
        begin = _first_not_below(q_order, q_low, q_high, arrival, steps)
        evictor = first + count - 1 + n_keys
        evicted = ~spare & (evictor < k_high)
        arrival = tl.load(k_order + evictor, mask=evicted, other=0) - n_memory
        end = tl.where(evicted, _first_not_below(q_order, q_low, q_high, arrival, steps), q_high)
    else:
        query = tl.load(q_order + first, mask=~spare, other=0)
        begin = _first_not_below(k_order, k_low, k_high, query + n_memory + 1, steps)
        begin = tl.maximum(begin - n_keys, k_low)
        query = tl.load(q_order + first + count - 1, mask=~spare, other=0)
        end = _first_not_below(k_order, k_low, k_high, query + n_memory + 1, steps)
    inside = at < most
    fields += row * most + at
    step = tl.num_programs(0).to(tl.int64) * most
    tl.store(fields, tl.where(spare, 0, bucket), mask=inside)
    tl.store(fields + step, tl.where(spare, 0, first), mask=inside)
    tl.store(fields + 2 * step, tl.where(spare, 0, count), mask=inside)
    tl.store(fields + 3 * step, tl.where(spare, 0, begin), mask=inside)
    tl.store(fields + 4 * step, tl.where(spare, 0, end), mask=inside)


@triton.jit
def _query_ranges(
    q_order,
    q_start,
    k_order,
    k_start,
    low,
    high,
    length,
    sources,
    n_buckets,
    bucket_steps,
    steps,
    n_memory,
    n_keys,
    BLOCK: tl.constexpr,
):
    """low, high (R, L) of ``key_ranges``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    none = tl.zeros((BLOCK,), tl.int32)
    q_start += row * (n_buckets + 1)
    k_start += row * (n_buckets + 1)
    bucket = tl.minimum(_first_not_below(q_start + 1, none, none + n_buckets, at + 1, bucket_steps), n_buckets - 1)
    query = tl.load(q_order + row * length + at, mask=inside, other=0)
    k_low, k_high = tl.load(k_start + bucket), tl.load(k_start + bucket + 1)
    end = _first_not_below(k_order + row * sources, k_low, k_high, query + n_memory + 1, steps)
    tl.store(low + row * length + at, tl.maximum(end - n_keys, k_low), mask=inside)
    tl.store(high + row * length + at, end, mask=inside)


@triton.jit
def _evictions(order, start, code, end, death, size, n_buckets, n_memory, n_keys, BLOCK: tl.constexpr):
    """death (R, S): the arrival of the key ``n_keys`` places on, if it is of the same bucket, or the segment's end."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    order += row * size
    start += row * (n_buckets + 1)
    key = tl.load(order + at, mask=inside, other=0)
    held = at < tl.load(start + n_buckets)
    bucket = tl.load(code + row * size + key, mask=held, other=0)
    evicted = held & (at + n_keys < tl.load(start + bucket + 1, mask=held, other=0))
    evictor = tl.load(order + at + n_keys, mask=evicted, other=0)
    last = tl.load(end + row * size + key, mask=held, other=0)
    arrival = tl.maximum(evictor - n_memory, -1).to(tl.int64)
    last = tl.where(evicted, tl.minimum(last, arrival), last)
    tl.store(death + row * size + key, last, mask=inside)
