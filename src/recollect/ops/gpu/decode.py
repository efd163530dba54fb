"""One position of sparse attention without gradients: ``decode_attention`` in one kernel and a copy of the memory.

A program takes one row (sequence and head). Regions and rings keep their keys in order of time, so what a position does
to one is a shift: the slots out .. last take over their successors, the last the new key. The query reads the slots as
they will be, from the old memory and the new key; of a key's copies the first region's counts, which a binary search of
its position in the earlier regions tells. Shapes are fixed and nothing waits for the device, so that a CUDA graph can
hold a step (after one call, which uploads the plan of the regions).

Floor per row of HAX at k = 128, heads of 64, bf16: 128 keys and values and their positions read, 34 kB, and up to as
many moved, 68 kB; the copy that a pure step makes of the whole memory (64 hashed keys in each of 256 buckets and 64
selected: 4.3 MB read and written) is what counts, 2.6 us a row at 3.35 TB/s.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from recollect.ops.attention_memory import Buckets, Memory, hash_regions, slot_regions
from recollect.ops.gpu.softmax import LOG2E
from recollect.ops.patterns import Dilated, KeySelection, Lsh, Pattern, Sink, Window

KINDS: dict[type[Pattern], int] = {Window: 0, Sink: 1, Dilated: 2, KeySelection: 3}
SINK: tl.constexpr = tl.constexpr(1)
DILATED: tl.constexpr = tl.constexpr(2)
SELECTION: tl.constexpr = tl.constexpr(3)
HASHED: tl.constexpr = tl.constexpr(4)


@triton.jit
def _ring(
    region,
    plan,
    position,
    score,
    new_score,
    q_code,
    k_code,
    place,
    kept,
    HAS_SCORE: tl.constexpr,
    HAS_CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slots that the query asks (first, how many hold a key) and those that the new key may change: the first of
    them, how many, and ``out`` and ``last`` (see the module; last is -1 where the region does not take the key). With
    them the position of the key that leaves the slots asked, and of the one that comes, -2 for none.
    """
    plan += region * 4
    kind, asked, n, parameter = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3)
    changed = asked
    if HAS_CODES:
        hashed = kind == HASHED
        changed += tl.load(k_code + parameter, mask=hashed, other=0).to(tl.int32) * n
        asked += tl.load(q_code + parameter, mask=hashed, other=0).to(tl.int32) * n
    at = tl.arange(0, BLOCK)
    inside = at < n * kept
    n_asked = tl.sum((tl.load(position + asked + at, mask=inside, other=-1) >= 0).to(tl.int32))
    count = tl.sum((tl.load(position + changed + at, mask=inside, other=-1) >= 0).to(tl.int32))
    full = count == n
    takes = (kind != SINK) | (count < n)
    takes = takes & ((kind != DILATED) | (place % tl.maximum(parameter, 1) == parameter - 1))
    out = count * 0
    if HAS_SCORE:
        chosen = kind == SELECTION
        scores = tl.load(score + at, mask=at < tl.where(chosen, n * kept, 0), other=float("inf")).to(tl.float32)
        lowest = tl.min(scores)
        out = tl.where(chosen, tl.min(tl.where(scores == lowest, at, n - 1)), out)
        better = tl.load(new_score).to(tl.float32) >= lowest
        takes = takes & ((kind != SELECTION) | (count < n) | better)
    here = takes & (asked == changed)
    leaves = tl.where(here & full, tl.load(position + changed + out, mask=full, other=-1), -2)
    last = tl.minimum(count, n - 1)
    out = tl.where(full, out, last)
    return asked, n_asked, changed, n, out, tl.where(takes, last, -1), leaves, tl.where(here, place, -2)


@triton.jit
def _holds(position, count, wanted, steps):
    """Whether ``count`` ascending positions hold each of those wanted."""
    low = wanted.to(tl.int32) * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        value = tl.load(position + middle, mask=searching, other=0)
        low = tl.where(searching & (value < wanted), middle + 1, low)
        high = tl.where(searching & (value >= wanted), middle, high)
    return (low < count) & (tl.load(position + low, mask=low < count, other=-1) == wanted)


@triton.jit
def _move(old, new, to, source, slot, moved, is_new, row, n_memory, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``source`` of the old memory, or the new key's, to the slots ``moved``."""
    column = tl.arange(0, BLOCK)
    there = moved[:, None] & (column < WIDTH)[None, :]
    at = (row * n_memory + source)[:, None] * WIDTH + column[None, :]
    kept = tl.load(old + at, mask=there & (is_new == 0)[:, None], other=0.0).to(tl.float32)
    came = tl.load(new + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    value = tl.where(is_new[:, None], came[None, :], kept)
    at = (row * n_memory + slot)[:, None] * WIDTH + column[None, :]
    tl.store(to + at, value.to(to.dtype.element_ty), mask=there)


@triton.jit
def _read(old, new, source, held, is_new, row, n_memory, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``source`` of the old memory or the new key's, float32."""
    column = tl.arange(0, BLOCK)
    at = (row * n_memory + source)[:, None] * WIDTH + column[None, :]
    there = held[:, None] & (is_new == 0)[:, None] & (column < WIDTH)[None, :]
    kept = tl.load(old + at, mask=there, other=0.0).to(tl.float32)
    came = tl.load(new + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return tl.where(is_new[:, None], came[None, :], kept)


@triton.jit
def _decode(
    q,
    k,
    v,
    k_old,
    v_old,
    position,
    score,
    next_position,
    new_score,
    q_code,
    k_code,
    reset,
    plan,
    y,
    k_kept,
    v_kept,
    position_kept,
    score_kept,
    next_kept,
    scale,
    n_regions,
    steps,
    n_memory,
    n_scores,
    n_rounds,
    heads,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // heads
    place = tl.load(next_position + batch)
    kept = row.to(tl.int32) * 0 + 1  # 0 where a reset empties the memory
    if HAS_RESET:
        kept -= tl.load(reset + batch).to(tl.int32)
        place *= kept
    tl.store(next_kept + batch, place + 1, mask=row % heads == 0)
    position += row * n_memory
    position_kept += row * n_memory
    score += row * n_scores
    score_kept += row * n_scores
    new_score += row
    q_code += row * n_rounds
    k_code += row * n_rounds
    n_column = tl.arange(0, BLOCK_N)
    query = tl.load(q + row * N + n_column, mask=n_column < N, other=0.0).to(tl.float32) * scale
    total = tl.zeros([BLOCK_P], tl.float32)
    weight = tl.zeros([1], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    for region in range(0, n_regions):
        asked, _asked, changed, n, out, last, _leaves, _comes = _ring(
            region, plan, position, score, new_score, q_code, k_code, place, kept, HAS_SCORE, HAS_CODES, BLOCK
        )
        for start in range(0, n, KEYS):
            at = start + tl.arange(0, KEYS)
            moved = (at >= out) & (at <= last)
            is_new = at == last
            source = at + ((at >= out) & (at < last)).to(tl.int32)
            came = tl.load(position + changed + source, mask=moved & (at != last), other=-1)
            tl.store(position_kept + changed + at, tl.where(is_new, place, came), mask=moved)
            _move(k_old, k, k_kept, changed + source, changed + at, moved, is_new, row, n_memory, N, BLOCK_N)
            _move(v_old, v, v_kept, changed + source, changed + at, moved, is_new, row, n_memory, P, BLOCK_P)
            if HAS_SCORE:
                mine = at < tl.where(tl.load(plan + region * 4) == SELECTION, n, 0)
                scores = tl.load(score + source, mask=mine & (at != last) & (at < n * kept), other=0.0).to(tl.float32)
                scores = tl.where(is_new, tl.load(new_score).to(tl.float32), scores)
                tl.store(score_kept + at, scores.to(score_kept.dtype.element_ty), mask=mine)
            # What the query reads: the slots as changed, or another bucket's as they are.
            is_new = at == tl.where(asked == changed, last, -1)
            source = asked + tl.where(asked == changed, source, at)
            where = tl.load(position + source, mask=(at < n * kept) & (is_new == 0), other=-1)
            where = tl.where(is_new, place, where)
            admitted = where >= 0
            for other in range(0, region):
                begin, count, _changed, _n, _out, _last, leaves, comes = _ring(
                    other, plan, position, score, new_score, q_code, k_code, place, kept, HAS_SCORE, HAS_CODES, BLOCK
                )
                known = _holds(position + begin, count, where, steps) & (where != leaves)
                admitted = admitted & (known == 0) & (where != comes)
            k_tile = _read(k_old, k, source, admitted, is_new, row, n_memory, N, BLOCK_N)
            v_tile = _read(v_old, v, source, admitted, is_new, row, n_memory, P, BLOCK_P)
            logits = tl.where(admitted, tl.sum(k_tile * query[None, :], 1), float("-inf"))
            highest = tl.maximum(peak, tl.max(logits))
            origin = tl.where(highest == float("-inf"), 0.0, highest)
            factor = tl.exp2(peak - origin)
            weights = tl.exp2(logits - origin)
            weight = weight * factor + tl.sum(weights)
            total = total * factor + tl.sum(weights[:, None] * v_tile, 0)
            peak = highest
    column = tl.arange(0, BLOCK_P)
    total = total / tl.where(weight > 0, weight, 1.0)
    tl.store(y + row * P + column, total.to(y.dtype.element_ty), mask=column < P)


@cache
def _plan(patterns: tuple[Pattern, ...], device: torch.device) -> tuple[Tensor, int]:
    """(kind, first slot, keys, parameter) of every region, int32, and the largest number of keys."""
    rows = [
        (KINDS[type(r.pattern)], r.begin, r.stop - r.begin, getattr(r.pattern, "stride", 1))
        for r in slot_regions(patterns)
    ]
    for region in hash_regions(patterns):
        assert isinstance(region.pattern, Lsh)
        keys = region.pattern.n_keys // region.pattern.n_rounds
        rows.append((HASHED.value, region.begin, keys, region.hash_round))
    return torch.tensor(rows, dtype=torch.int32).to(device), max(row[2] for row in rows)


def decode(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
    scale: float,
) -> tuple[Tensor, Memory]:
    """``decode_attention.decode`` for tensors that need no gradient: y (B, 1, H, P) and the next memory."""
    batch, _, heads, d_key = q_BLHN.shape
    d_value, n_memory = v_BLHP.shape[3], memory.position.shape[2]
    plan, most = _plan(patterns, q_BLHN.device)
    k, v, position, score, next_position = (x.contiguous() for x in memory)
    bases = (k, v, position)
    if reset is not None:
        row = reset[:, 0, None, None]
        bases = (*(torch.where(row[..., None], 0, x) for x in (k, v)), torch.where(row, -1, position))
    kept = [
        base.to(dtype, copy=base is old)
        for base, old, dtype in zip(
            bases,
            (k, v, position),
            (torch.promote_types(k.dtype, k_BLHN.dtype), torch.promote_types(v.dtype, v_BLHP.dtype), torch.int64),
            strict=True,
        )
    ]
    new_score = score if score_BLH is None else score_BLH.detach().contiguous()
    score_kept = torch.empty_like(score, dtype=torch.promote_types(score.dtype, new_score.dtype))
    codes = (position, position) if buckets is None else tuple(x.contiguous() for x in buckets)
    next_kept = torch.empty_like(next_position)
    y = torch.empty(batch, 1, heads, d_value, dtype=v_BLHP.dtype, device=v_BLHP.device)
    block_n, block_p = (max(16, triton.next_power_of_2(width)) for width in (d_key, d_value))
    _decode[(batch * heads,)](
        *(q_BLHN.contiguous(), k_BLHN.contiguous(), v_BLHP.contiguous(), k, v, position, score, next_position),
        *(new_score, *codes, next_position if reset is None else reset.contiguous(), plan, y, *kept, score_kept),
        *(next_kept, scale * LOG2E, len(plan), most.bit_length(), n_memory, score.shape[2]),
        *(0 if buckets is None else codes[0].shape[3], heads, d_key, d_value, block_n, block_p),
        *(64 if max(block_n, block_p) <= 64 else 32, max(16, triton.next_power_of_2(most))),
        *(score.shape[2] > 0, buckets is not None, reset is not None),
        num_warps=4,
    )
    return y, Memory(kept[0], kept[1], kept[2], score_kept, next_kept)
