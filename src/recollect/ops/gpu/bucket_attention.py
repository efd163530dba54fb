"""One hash round of sparse attention: queries and keys in the order of (row, bucket, time), gathered by index.

A bucket's queries are cut into tiles of C. As queries advance, the keys that a bucket holds move on at both ends and
never back, so those of a tile are one run of the bucket's keys: from the first that outlives the tile's first query to
the last that has come by its last one. Backwards the queries that meet a tile of keys are one run too, so that no
gradient is added to by two programs and the result is deterministic. Tiles are as many as the sizes allow
(``bucketing``), and those that turn out empty do nothing.

Floor of HAX at k = 128 (64 hashed keys in 256 buckets by this pass, 64 selected), heads of 64, bf16, per query and
head, for buckets longer than a tile of 64: a tile meets 64 + 64 keys.

* operations: forward 256 per key, 33 thousand; backward 640 per key, and 256 more for weights that both of its kernels
  work out, 115 thousand. For 8 heads of 131072 queries, at 800 Tflop/s, 0.04 and 0.15 ms.
* bytes: forward reads q, y (float32) and lse, writes y and lse, and gathers two rows of keys and values: 1.1 kB with
  indices, 0.35 ms at 3.35 TB/s, less what the second-level cache saves of gathers. Backward gathers as much in either
  kernel, reads q, dy, k and v once more and writes float32 dq, dk and dv: 2.3 kB, 0.75 ms.

Short sequences have short buckets (32 keys at 8192 tokens): there the number of tiles and of launches decides.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recollect.ops.gpu.bucketing import Sorted, Tiles
from recollect.ops.gpu.softmax import (
    LOG2E,
    Tiling,
    extend,
    normalise,
    product,
    put_rows,
    take_rows,
    tiling,
    weigh_again,
)


class Hashed(NamedTuple):
    """The keys of one hash round. Rows R, queries L and sources S are those of ``key_sets``; all contiguous."""

    q: Sorted
    k: Sorted  # those that the round holds and uses
    n_keys: int
    until_RS: Tensor
    q_code_ERL: Tensor  # of this round and those before, this one last
    code_ERS: Tensor
    death_ERS: Tensor


@triton.jit
def _admitted(
    row, query, present, source, there, length, n_memory, until, q_code, code, death, n_rows, EARLIER: tl.constexpr
):
    """Whether each query of a tile may use each source, (queries, keys) as ``query`` and ``source`` are shaped."""
    sources = n_memory + length
    key_at, query_at = row * sources + source, row * length + query
    dies = tl.load(death + EARLIER * n_rows * sources + key_at, mask=there, other=0).to(tl.int32)
    begins = tl.load(until + key_at, mask=there, other=0).to(tl.int32)
    begins = tl.maximum(begins, tl.maximum(source - n_memory, 0))
    mask = present & there & (begins <= query) & (query < dies)
    for earlier in tl.static_range(EARLIER):
        asked = tl.load(q_code + earlier * n_rows * length + query_at, mask=present, other=0)
        lies = tl.load(code + earlier * n_rows * sources + key_at, mask=there, other=0)
        dies = tl.load(death + earlier * n_rows * sources + key_at, mask=there, other=0).to(tl.int32)
        mask = mask & ((asked != lies) | (query >= dies))
    return mask


@triton.jit
def _forward(
    q,
    k,
    v,
    tile_first,
    tile_filled,
    tile_begin,
    tile_end,
    q_order,
    k_order,
    until,
    q_code,
    code,
    death,
    y_before,
    y,
    lse,
    scale,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    length,
    n_memory,
    heads,
    n_rows,
    tiles,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    EARLIER: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GOES_ON: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    begin = tl.load(tile_first + program)
    end = begin + tl.load(tile_filled + program)
    low, high = tl.load(tile_begin + program), tl.load(tile_end + program)
    batch, head = row // heads, row % heads
    sources = n_memory + length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    at = begin + tl.arange(0, TILE)
    present = at < end
    query = tl.load(q_order + row * length + at, mask=present, other=0)
    q_tile = take_rows(q, query, q_step, present, N, BLOCK_N)
    out = (batch * length * heads + head) * P
    if GOES_ON:
        peak = tl.load(lse + row * length + query, mask=present, other=float("-inf"))
        weight = tl.full([TILE], 1.0, tl.float32)  # nothing, where the peak is -inf
        total = take_rows(y_before + out, query, heads * P, present, P, BLOCK_P).to(tl.float32)
    else:
        peak = tl.full([TILE], float("-inf"), tl.float32)
        weight = tl.zeros([TILE], tl.float32)
        total = tl.zeros([TILE, BLOCK_P], tl.float32)
    for start in range(low, high, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < high
        source = tl.load(k_order + row * sources + place, mask=there, other=0)
        k_tile = take_rows(k, source, k_step, there, N, BLOCK_N)
        v_tile = take_rows(v, source, v_step, there, P, BLOCK_P)
        mask = _admitted(
            row,
            query[:, None],
            present[:, None],
            source[None, :],
            there[None, :],
            length,
            n_memory,
            until,
            q_code,
            code,
            death,
            n_rows,
            EARLIER,
        )
        total, weight, peak = extend(total, weight, peak, q_tile, k_tile, v_tile, mask, scale)
    total, peak = normalise(total, weight, peak)
    put_rows(y + out, query, heads * P, present, total, P, BLOCK_P)
    tl.store(lse + row * length + query, peak, mask=present)


@triton.jit
def _backward_q(
    q,
    k,
    v,
    tile_first,
    tile_filled,
    tile_begin,
    tile_end,
    q_order,
    k_order,
    until,
    q_code,
    code,
    death,
    dy,
    lse,
    delta,
    before,
    dq,
    scale,
    logit_scale,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    length,
    n_memory,
    heads,
    n_rows,
    tiles,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    EARLIER: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GOES_ON: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    begin = tl.load(tile_first + program)
    end = begin + tl.load(tile_filled + program)
    low, high = tl.load(tile_begin + program), tl.load(tile_end + program)
    batch, head = row // heads, row % heads
    sources = n_memory + length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    at = begin + tl.arange(0, TILE)
    present = at < end
    query = tl.load(q_order + row * length + at, mask=present, other=0)
    q_tile = take_rows(q, query, q_step, present, N, BLOCK_N)
    dy += (batch * length * heads + head) * P
    dy_tile = take_rows(dy, query, heads * P, present, P, BLOCK_P)
    lse_tile = tl.load(lse + row * length + query, mask=present, other=0.0)[:, None]
    delta_tile = tl.load(delta + row * length + query, mask=present, other=0.0)[:, None]
    total = tl.zeros([TILE, BLOCK_N], tl.float32)
    for start in range(low, high, KEYS):
        place = start + tl.arange(0, KEYS)
        there = place < high
        source = tl.load(k_order + row * sources + place, mask=there, other=0)
        k_tile = take_rows(k, source, k_step, there, N, BLOCK_N)
        v_tile = take_rows(v, source, v_step, there, P, BLOCK_P)
        mask = _admitted(
            row,
            query[:, None],
            present[:, None],
            source[None, :],
            there[None, :],
            length,
            n_memory,
            until,
            q_code,
            code,
            death,
            n_rows,
            EARLIER,
        )
        _, slopes = weigh_again(q_tile, k_tile, dy_tile, v_tile, lse_tile, delta_tile, mask, logit_scale)
        total += product(slopes.to(k_tile.dtype), k_tile)
    total *= scale
    out = (batch * length * heads + head) * N
    if GOES_ON:
        total += take_rows(before + out, query, heads * N, present, N, BLOCK_N)
    put_rows(dq + out, query, heads * N, present, total, N, BLOCK_N)


@triton.jit
def _backward_kv(
    q,
    k,
    v,
    tile_first,
    tile_filled,
    tile_begin,
    tile_end,
    q_order,
    k_order,
    until,
    q_code,
    code,
    death,
    dy,
    lse,
    delta,
    dk,
    dv,
    scale,
    logit_scale,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    length,
    n_memory,
    heads,
    n_rows,
    tiles,
    N: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    EARLIER: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GOES_ON: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    begin = tl.load(tile_first + program)
    end = begin + tl.load(tile_filled + program)
    low, high = tl.load(tile_begin + program), tl.load(tile_end + program)
    batch, head = row // heads, row % heads
    sources = n_memory + length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    dy += (batch * length * heads + head) * P
    dk += (batch * sources * heads + head) * N
    dv += (batch * sources * heads + head) * P
    at = begin + tl.arange(0, TILE)
    there = at < end
    source = tl.load(k_order + row * sources + at, mask=there, other=0)
    k_tile = take_rows(k, source, k_step, there, N, BLOCK_N)
    v_tile = take_rows(v, source, v_step, there, P, BLOCK_P)
    dk_tile = tl.zeros([TILE, BLOCK_N], tl.float32)
    dv_tile = tl.zeros([TILE, BLOCK_P], tl.float32)
    for start in range(low, high, QUERIES):
        place = start + tl.arange(0, QUERIES)
        present = place < high
        query = tl.load(q_order + row * length + place, mask=present, other=0)
        q_tile = take_rows(q, query, q_step, present, N, BLOCK_N)
        dy_tile = take_rows(dy, query, heads * P, present, P, BLOCK_P)
        lse_tile = tl.load(lse + row * length + query, mask=present, other=0.0)[None, :]
        delta_tile = tl.load(delta + row * length + query, mask=present, other=0.0)[None, :]
        mask = _admitted(
            row,
            query[None, :],
            present[None, :],
            source[:, None],
            there[:, None],
            length,
            n_memory,
            until,
            q_code,
            code,
            death,
            n_rows,
            EARLIER,
        )
        weights, slopes = weigh_again(k_tile, q_tile, v_tile, dy_tile, lse_tile, delta_tile, mask, logit_scale)
        dv_tile += product(weights.to(dy_tile.dtype), dy_tile)
        dk_tile += product(slopes.to(q_tile.dtype), q_tile)
    dk_tile *= scale
    if GOES_ON:
        dk_tile += take_rows(dk, source, heads * N, there, N, BLOCK_N)
        dv_tile += take_rows(dv, source, heads * P, there, P, BLOCK_P)
    put_rows(dk, source, heads * N, there, dk_tile, N, BLOCK_N)
    put_rows(dv, source, heads * P, there, dv_tile, P, BLOCK_P)


def forward(
    q_BLHN: Tensor,
    k_BSHN: Tensor,
    v_BSHP: Tensor,
    keys: Hashed,
    q_tiles: Tiles,
    scale: float,
    y_before: Tensor | None,
    y_BLHP: Tensor,
    lse_BHL: Tensor,
) -> None:
    """Write y, and lse in place, with the round's keys taken into what ``y_before`` and lse hold of others. Features
    of q, k and v are contiguous, y and lse altogether.
    """
    tiles = tiling(q_BLHN, v_BSHP, backward=False)
    _forward[(q_tiles.first.numel(),)](
        *(q_BLHN, k_BSHN, v_BSHP, *q_tiles[1:], *_arrays(keys), y_BLHP if y_before is None else y_before, y_BLHP),
        *(lse_BHL, scale * LOG2E, *_sizes(q_BLHN, k_BSHN, v_BSHP, keys, q_tiles, tiles), y_before is not None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def backward(
    q_BLHN: Tensor,
    k_BSHN: Tensor,
    v_BSHP: Tensor,
    keys: Hashed,
    q_tiles: Tiles,
    k_tiles: Tiles,
    scale: float,
    dy_BLHP: Tensor,
    lse_BHL: Tensor,
    delta_BHL: Tensor,
    dq_before: Tensor | None,
    dq_BLHN: Tensor,
    dk_BSHN: Tensor,
    dv_BSHP: Tensor,
) -> None:
    """Write dq, dk and dv (contiguous float32, zero where the round has no key); with ``dq_before`` on top of it and of
    what dk and dv hold.
    """
    tiles = tiling(q_BLHN, v_BSHP, backward=True)
    arrays, scales = (*_arrays(keys), dy_BLHP, lse_BHL, delta_BHL), (scale, scale * LOG2E)
    _backward_q[(q_tiles.first.numel(),)](
        *(q_BLHN, k_BSHN, v_BSHP, *q_tiles[1:], *arrays, dq_BLHN if dq_before is None else dq_before, dq_BLHN, *scales),
        *(*_sizes(q_BLHN, k_BSHN, v_BSHP, keys, q_tiles, tiles), dq_before is not None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    _backward_kv[(k_tiles.first.numel(),)](
        *(q_BLHN, k_BSHN, v_BSHP, *k_tiles[1:], *arrays, dk_BSHN, dv_BSHP, *scales),
        *(*_sizes(q_BLHN, k_BSHN, v_BSHP, keys, k_tiles, tiles), dq_before is not None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _arrays(keys: Hashed) -> tuple[Tensor, ...]:
    return (keys.q.order, keys.k.order, keys.until_RS, keys.q_code_ERL, keys.code_ERS, keys.death_ERS)


def _sizes(q_BLHN: Tensor, k_BSHN: Tensor, v_BSHP: Tensor, keys: Hashed, own: Tiles, tiles: Tiling) -> tuple[int, ...]:
    """Strides and sizes, in the order all kernels take them."""
    _, length, heads, d_key = q_BLHN.shape
    rounds, rows, _ = keys.q_code_ERL.shape
    strides = [x.stride(axis) for x in (q_BLHN, k_BSHN, v_BSHP) for axis in (0, 1, 2)]
    sizes = (length, k_BSHN.shape[1] - length, heads, rows, own.first.shape[1], d_key, v_BSHP.shape[3])
    tile = keys.q.tile
    return (*strides, *sizes, tile, rounds - 1, min(tile, tiles.keys), tiles.d_key, tiles.d_value)
