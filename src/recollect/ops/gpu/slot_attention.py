"""The slots' part of sparse attention: a chunk of queries against the keys alive as it begins, and its own.

A program takes the C queries of one chunk of one row (sequence and head), or a part of them where heads are wide. Their
keys from before are a list of at most ``slots`` sources, gathered a tile at a time into products of C x tile; the keys
of the chunk itself follow, as far as one is ever admitted (with key selection late in a sequence hardly any is good
enough). Whether a query may use a source is birth <= query < death.

Floor of HAX at k = 128 (64 selected keys by this pass, 64 hashed), heads of 64, bf16, per query and head:

* operations: the tile has 64 listed keys and up to 64 own. Forward 4 x 64 = 256 per key, 16 to 33 thousand; backward
  640 per key, 41 to 82 thousand. A tensor core at 800 Tflop/s does 8 heads of 131072 queries in 0.02 to 0.04 and
  0.05 to 0.11 ms.
* bytes: forward reads q and writes y (float32 if another pass follows) and lse, 388 B, and 256 B for its share of the
  chunk's listed keys and values, as much again for own ones; indices 16 to 24 B. About 0.7 kB: 0.2 ms for the same at
  3.35 TB/s. Backward reads q, dy, lse, delta, listed and own rows and dq, and writes dq, 1.3 kB, and adds float32
  gradients of the listed rows, 512 B, by atomics that meet in the second-level cache: about 0.5 ms.

Backward is not deterministic: chunks add to the gradients of a key that outlives its chunk in whatever order they run.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _own_reach(death, n_memory, start, until, length, CHUNK: tl.constexpr):
    """How far the keys from ``start`` on reach that some query from before ``until`` may use."""
    own = tl.arange(0, CHUNK)
    dies = tl.load(death + n_memory + start + own, mask=start + own < tl.minimum(until, length), other=0)
    return tl.max(tl.where(dies > start + own, own + 1, 0))


@triton.jit
def _sources(begin, listed, n_listed, padded, n_own, start, birth, death, n_memory, KEYS: tl.constexpr):
    """A tile of sources, of the list or from ``start`` on, and the queries first <= i < last that may use each."""
    at = begin + tl.arange(0, KEYS)
    source = tl.load(listed + at, mask=at < n_listed, other=-1)
    own = at - padded
    source = tl.where((own >= 0) & (own < n_own), n_memory + start + own, source)
    held = (source >= 0) & (source < n_memory)
    first = tl.load(birth + source, mask=held, other=0).to(tl.int32)
    first = tl.maximum(first, source - n_memory)
    return source, first, tl.load(death + source, mask=source >= 0, other=0).to(tl.int32)


@triton.jit
def _forward(
    q,
    k,
    v,
    listed,
    count,
    birth,
    death,
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
    slots,
    chunks,
    heads,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0)
    program, block = block // (CHUNK // QUERIES), block % (CHUNK // QUERIES)
    row, chunk = (program // chunks).to(tl.int64), program % chunks
    batch, head = row // heads, row % heads
    sources = n_memory + length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    birth += row * sources
    death += row * sources
    listed += program.to(tl.int64) * slots
    query = chunk * CHUNK + block * QUERIES + tl.arange(0, QUERIES)
    present = query < length
    q_tile = take_rows(q, query, q_step, present, N, BLOCK_N)
    total = tl.zeros([QUERIES, BLOCK_P], tl.float32)
    weight = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    n_listed = tl.load(count + program)
    padded = tl.cdiv(n_listed, KEYS) * KEYS
    start = chunk * CHUNK
    n_own = _own_reach(death, n_memory, start, start + (block + 1) * QUERIES, length, CHUNK)
    for begin in range(0, padded + n_own, KEYS):
        source, first, last = _sources(begin, listed, n_listed, padded, n_own, start, birth, death, n_memory, KEYS)
        k_tile = take_rows(k, source, k_step, first < last, N, BLOCK_N)
        v_tile = take_rows(v, source, v_step, first < last, P, BLOCK_P)
        mask = (first[None, :] <= query[:, None]) & (query[:, None] < last[None, :])
        total, weight, peak = extend(total, weight, peak, q_tile, k_tile, v_tile, mask, scale)
    total, peak = normalise(total, weight, peak)
    put_rows(y + (batch * length * heads + head) * P, query, heads * P, present, total, P, BLOCK_P)
    tl.store(lse + row * length + query, peak, mask=present)


@triton.jit
def _backward(
    q,
    k,
    v,
    listed,
    count,
    birth,
    death,
    dy,
    lse,
    delta,
    before,
    dq,
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
    slots,
    chunks,
    heads,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GOES_ON: tl.constexpr,
):
    block = tl.program_id(0)
    program, block = block // (CHUNK // QUERIES), block % (CHUNK // QUERIES)
    row, chunk = (program // chunks).to(tl.int64), program % chunks
    batch, head = row // heads, row % heads
    sources = n_memory + length
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    dk += (batch * sources * heads + head) * N
    dv += (batch * sources * heads + head) * P
    birth += row * sources
    death += row * sources
    listed += program.to(tl.int64) * slots
    query = chunk * CHUNK + block * QUERIES + tl.arange(0, QUERIES)
    present = query < length
    q_tile = take_rows(q, query, q_step, present, N, BLOCK_N)
    dy_tile = take_rows(dy + (batch * length * heads + head) * P, query, heads * P, present, P, BLOCK_P)
    lse_tile = tl.load(lse + row * length + query, mask=present, other=0.0)[:, None]
    delta_tile = tl.load(delta + row * length + query, mask=present, other=0.0)[:, None]
    total = tl.zeros([QUERIES, BLOCK_N], tl.float32)
    n_listed = tl.load(count + program)
    padded = tl.cdiv(n_listed, KEYS) * KEYS
    start = chunk * CHUNK
    n_own = _own_reach(death, n_memory, start, start + (block + 1) * QUERIES, length, CHUNK)
    n_column, p_column = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_P)[None, :]
    for begin in range(0, padded + n_own, KEYS):
        source, first, last = _sources(begin, listed, n_listed, padded, n_own, start, birth, death, n_memory, KEYS)
        alive = first < last
        k_tile = take_rows(k, source, k_step, alive, N, BLOCK_N)
        v_tile = take_rows(v, source, v_step, alive, P, BLOCK_P)
        mask = (first[None, :] <= query[:, None]) & (query[:, None] < last[None, :])
        weights, slopes = weigh_again(q_tile, k_tile, dy_tile, v_tile, lse_tile, delta_tile, mask, logit_scale)
        slopes = slopes.to(k_tile.dtype)
        total += product(slopes, k_tile)
        at = source.to(tl.int64)[:, None] * heads
        dk_tile = product(tl.trans(slopes), q_tile) * scale
        tl.atomic_add(dk + at * N + n_column, dk_tile, mask=alive[:, None] & (n_column < N), sem="relaxed")
        dv_tile = product(tl.trans(weights.to(dy_tile.dtype)), dy_tile)
        tl.atomic_add(dv + at * P + p_column, dv_tile, mask=alive[:, None] & (p_column < P), sem="relaxed")
    total *= scale
    at = (batch * length * heads + head) * N
    if GOES_ON:
        total += take_rows(before + at, query, heads * N, present, N, BLOCK_N)
    put_rows(dq + at, query, heads * N, present, total, N, BLOCK_N)


class Listed(NamedTuple):
    """The keys of every chunk of queries. Sources and rows are those of ``key_sets``."""

    source_RCK: Tensor  # int32: those from before each chunk that some query of it may use
    count_RC: Tensor  # int32: how many
    birth_RS: Tensor
    death_RS: Tensor
    chunk: int


def forward(
    q_BLHN: Tensor, k_BSHN: Tensor, v_BSHP: Tensor, keys: Listed, scale: float, y_BLHP: Tensor, lse_BHL: Tensor
) -> None:
    """Write y and lse of the slots' keys alone. Features of q, k and v are contiguous, y and lse altogether."""
    sizes, tiles = _sizes(q_BLHN, k_BSHN, v_BSHP, keys), tiling(q_BLHN, v_BSHP, backward=False)
    _forward[(_programs(keys, tiles),)](
        *(q_BLHN, k_BSHN, v_BSHP, *keys[:4], y_BLHP, lse_BHL, scale * LOG2E),
        *(*sizes, min(tiles.queries, keys.chunk), tiles.keys, tiles.d_key, tiles.d_value),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def backward(
    q_BLHN: Tensor,
    k_BSHN: Tensor,
    v_BSHP: Tensor,
    keys: Listed,
    scale: float,
    dy_BLHP: Tensor,
    lse_BHL: Tensor,
    delta_BHL: Tensor,
    dq_before: Tensor | None,
    dq_BLHN: Tensor,
    dk_BSHN: Tensor,
    dv_BSHP: Tensor,
) -> None:
    """Write dq, on top of ``dq_before`` where that is given, and add to dk and dv (contiguous float32)."""
    sizes, tiles = _sizes(q_BLHN, k_BSHN, v_BSHP, keys), tiling(q_BLHN, v_BSHP, backward=True)
    _backward[(_programs(keys, tiles),)](
        *(q_BLHN, k_BSHN, v_BSHP, *keys[:4], dy_BLHP, lse_BHL, delta_BHL),
        *(dq_BLHN if dq_before is None else dq_before, dq_BLHN, dk_BSHN, dv_BSHP, scale, scale * LOG2E),
        *(*sizes, min(tiles.queries, keys.chunk), tiles.keys, tiles.d_key, tiles.d_value, dq_before is not None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _sizes(q_BLHN: Tensor, k_BSHN: Tensor, v_BSHP: Tensor, keys: Listed) -> tuple[int, ...]:
    """Strides and sizes, in the order both kernels take them."""
    _, length, heads, d_key = q_BLHN.shape
    _, chunks, slots = keys.source_RCK.shape
    strides = [x.stride(axis) for x in (q_BLHN, k_BSHN, v_BSHP) for axis in (0, 1, 2)]
    n_memory = k_BSHN.shape[1] - length
    return (*strides, length, n_memory, slots, chunks, heads, d_key, v_BSHP.shape[3], keys.chunk)


def _programs(keys: Listed, tiles: Tiling) -> int:
    rows, chunks, _ = keys.source_RCK.shape
    return rows * chunks * (keys.chunk // min(tiles.queries, keys.chunk))
