"""Sparse attention in time order: the slots of every pattern are kept as in decoding, each query gathers its keys.

A row is one sequence of one head. Sources are the memory's slots, then the new positions. What the patterns hold is
kept as indices of sources, a chunk of queries at a time is given its lists of keys, and products run over gathered rows
of keys and values. Backward goes through time forward again and makes the same lists, so that nothing of size length x
budget exists. Rows in use are the keys still held by some pattern, so they stay in cache however long the sequence is.

Buckets: sources of a round are counted per bucket beforehand, so that each bucket owns a range of ``order``; the ring
of a bucket is then the last ``n_keys`` entries it has written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from recollect.ops.kernels.compiled import Array, arrays, kernel, over_rows
from recollect.ops.kernels.gathered import dots, softmax, spread, weighted
from recollect.ops.kernels.vectors import LANES

WINDOW, SINK, DILATED, SELECTION = 0, 1, 2, 3
"""Codes of the patterns that ignore hash buckets."""


@kernel
def _seed(
    plan: Array, position: Array, slots: Array, count: Array, head: Array, lowest: Array, flags: Array, key: Array
) -> None:
    """Take over a memory's slots of the patterns that ignore buckets. ``plan``: (pattern, n_keys, stride, begin)."""
    count[:], head[:] = 0, 0
    flags[:] = 0
    for p in range(plan.shape[0]):
        begin = plan[p, 3]
        lowest[p] = -1
        for i in range(begin, begin + plan[p, 1]):
            if i < position.shape[0] and position[i] >= 0:
                slots[begin + count[p]] = i
                count[p] += 1
                flags[key[i]] |= 1 << p


@kernel
def _seed_buckets(
    n_patterns: int,
    n_keys: int,
    begin: int,
    position: Array,
    k_bucket: Array,
    key: Array,
    flags: Array,
    first: Array,
    filled: Array,
    start: Array,
    generation: Array,
    order: Array,
    code: Array,
) -> None:
    """Give every bucket of every round its range of ``order`` and take over a memory's rings. k_bucket (L, rounds)."""
    n_rounds, n_buckets = first.shape
    n_memory = position.shape[0]
    generation[:], start[:], filled[:] = 0, 0, 0
    for r in range(n_rounds):
        rings = begin + r * n_buckets * n_keys
        if n_memory:
            for b in range(n_buckets):
                for i in range(rings + b * n_keys, rings + (b + 1) * n_keys):
                    filled[r, b] += position[i] >= 0
        for t in range(k_bucket.shape[0]):
            filled[r, k_bucket[t, r]] += 1
        before = 0
        for b in range(n_buckets):
            first[r, b] = before
            before += filled[r, b]
            filled[r, b] = 0
        if n_memory:
            for b in range(n_buckets):
                for i in range(rings + b * n_keys, rings + (b + 1) * n_keys):
                    if position[i] >= 0:
                        order[r, first[r, b] + filled[r, b]] = i
                        filled[r, b] += 1
                        flags[key[i]] |= 1 << (n_patterns + r)
                        code[r, key[i]] = b


@kernel
def _admit(
    s: int,
    place: int,
    plan: Array,
    score: Array,
    slots: Array,
    count: Array,
    head: Array,
    lowest: Array,
    flags: Array,
    key: Array,
) -> int:
    """Offer source ``s`` at in-segment position ``place`` to every pattern; returns the bits of those that took it."""
    taken = 0
    for p in range(plan.shape[0]):
        pattern, n_keys, stride, begin = plan[p, 0], plan[p, 1], plan[p, 2], plan[p, 3]
        full = count[p] == n_keys
        at = count[p]
        if pattern == SINK:
            if full:
                continue
        elif pattern == SELECTION:
            if full:
                if lowest[p] < 0:
                    lowest[p] = 0
                    for i in range(1, n_keys):
                        one, other = slots[begin + i], slots[begin + lowest[p]]
                        if score[one] < score[other] or (score[one] == score[other] and one < other):
                            lowest[p] = i
                if score[s] < score[slots[begin + lowest[p]]]:
                    continue
                at = lowest[p]
                lowest[p] = -1
        else:
            if pattern == DILATED and place % stride != stride - 1:
                continue
            if full:
                at = head[p]
                head[p] = (at + 1) % n_keys
        if full:
            old = slots[begin + at]
            flags[key[old]] &= ~(1 << p)
        else:
            count[p] += 1
        slots[begin + at] = s
        taken |= 1 << p
    return taken


@kernel
def _list_keys(
    begin: int,
    stop: int,
    n_memory: int,
    clock: Array,
    reset: Array,
    plan: Array,
    score: Array,
    slots: Array,
    count: Array,
    head: Array,
    lowest: Array,
    flags: Array,
    key: Array,
    n_keys: int,
    q_bucket: Array,
    k_bucket: Array,
    first: Array,
    filled: Array,
    start: Array,
    generation: Array,
    order: Array,
    code: Array,
    index: Array,
    listed: Array,
) -> None:
    """Sources that each query ``begin..stop`` attends to: index (chunk, budget), listed (chunk,).

    ``clock`` holds the next position within the segment and the number of resets so far.
    """
    n_patterns, n_rounds = plan.shape[0], first.shape[0]
    in_slots = (1 << n_patterns) - 1
    for t in range(begin, stop):
        if reset.shape[0] and reset[t]:
            clock[0] = 0
            clock[1] += 1
            count[:], head[:], lowest[:] = 0, 0, -1
        s = n_memory + t
        mine = _admit(s, clock[0], plan, score, slots, count, head, lowest, flags, key)
        clock[0] += 1
        for r in range(n_rounds):
            b = k_bucket[t, r]
            if generation[r, b] != clock[1]:
                generation[r, b] = clock[1]
                start[r, b] = filled[r, b]
            if filled[r, b] - start[r, b] >= n_keys:
                flags[key[order[r, first[r, b] + filled[r, b] - n_keys]]] &= ~(1 << (n_patterns + r))
            order[r, first[r, b] + filled[r, b]] = s
            filled[r, b] += 1
            mine |= 1 << (n_patterns + r)
        flags[s] = mine
        into = index[t - begin]
        n = 0
        for p in range(n_patterns):
            earlier = (1 << p) - 1
            for i in range(plan[p, 3], plan[p, 3] + count[p]):
                into[n] = slots[i]
                n += (flags[key[slots[i]]] & earlier) == 0
        for r in range(n_rounds):
            b = q_bucket[t, r]
            if generation[r, b] != clock[1]:
                continue
            for i in range(max(start[r, b], filled[r, b] - n_keys), filled[r, b]):
                source = order[r, first[r, b] + i]
                held = flags[key[source]]
                into[n] = source
                fresh = (held & in_slots) == 0
                for e in range(r):
                    if (held >> (n_patterns + e)) & 1:
                        where = code[e, key[source]] if source < n_memory else k_bucket[source - n_memory, e]
                        fresh = fresh and where != q_bucket[t, e]
                n += fresh
        listed[t - begin] = n


@kernel
def _hand_over(
    n_keys: int,
    begin: int,
    clock: Array,
    plan: Array,
    slots: Array,
    count: Array,
    head: Array,
    first: Array,
    filled: Array,
    start: Array,
    generation: Array,
    order: Array,
    table: Array,
) -> None:
    """The source that every slot of the outgoing memory holds, -1 where it is empty."""
    table[:] = -1
    for p in range(plan.shape[0]):
        held, into = count[p], plan[p, 3]
        if plan[p, 0] == SELECTION:
            table[into : into + held] = np.sort(slots[into : into + held])
        else:
            for i in range(held):
                table[into + i] = slots[into + (head[p] + i) % plan[p, 1]]
    n_buckets = first.shape[1]
    for r in range(first.shape[0]):
        for b in range(n_buckets):
            if generation[r, b] == clock[1]:
                into = begin + (r * n_buckets + b) * n_keys
                low = max(start[r, b], filled[r, b] - n_keys)
                for i in range(low, filled[r, b]):
                    table[into + i - low] = order[r, first[r, b] + i]


@kernel
def _run(
    begin: int,
    end: int,
    heads: int,
    backward: bool,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    dy: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    chunk: int,
    budget: int,
    plan: Array,
    ring: Array,
    next_position: Array,
    reset: Array,
    position: Array,
    key_of: Array,
    score: Array,
    q_bucket: Array,
    k_bucket: Array,
    table: Array,
) -> None:
    """Rows ``begin..end``: y and table, or with ``backward`` dq, and dk and dv added to what they hold.

    q, dq (B, L, H, N), y, dy (B, L, H, P); k, dk (R, S * N padded), v, dv (R, S * P padded). ring: (n_keys, n_buckets,
    n_rounds, first slot). position, key_of (R, M), score (R, S) or (R, 0), buckets (B, L, H, n_rounds), reset (B, L) or
    (B, 0).
    """
    length, d_key, d_value = q.shape[1], q.shape[3], y.shape[3]
    n_memory = position.shape[1]
    sources = n_memory + length
    k_blocks, v_blocks = (d_key + LANES - 1) // LANES, (d_value + LANES - 1) // LANES
    dtype = q.dtype
    n_keys, n_buckets, n_rounds, rings = ring[0], ring[1], ring[2], ring[3]
    slots = np.zeros(rings, np.int32)
    count = np.zeros(plan.shape[0], np.int64)
    head, lowest = count.copy(), count.copy()
    flags, key = np.zeros(sources, np.int64), np.arange(sources).astype(np.int32)
    first = np.zeros((n_rounds, n_buckets), np.int32)
    filled, start, generation = first.copy(), first.copy(), first.copy()
    order = np.zeros((n_rounds, sources if n_rounds else 0), np.int32)
    code = np.zeros((n_rounds, n_memory), np.int32)
    index = np.zeros((chunk, budget + 1), np.int32)
    listed = np.zeros(chunk, np.int64)
    clock = np.zeros(2, np.int64)
    padded = (budget + LANES - 1) // LANES * LANES
    logit, weight, slope = np.zeros(padded, dtype), np.zeros(padded, dtype), np.zeros(padded, dtype)
    x, gx = np.zeros(k_blocks * LANES, dtype), np.zeros(k_blocks * LANES, dtype)
    out = np.zeros(v_blocks * LANES, dtype)
    factor = dtype.type(scale)
    for row in range(begin, end):
        b, h = row // heads, row % heads
        key[:n_memory] = key_of[row]
        keys, values, scores = k[row], v[row], score[row]
        clock[0], clock[1] = next_position[b], 0
        q_codes, k_codes = q_bucket[b, :, h], k_bucket[b, :, h]
        _seed(plan, position[row], slots, count, head, lowest, flags, key)
        if n_rounds:
            _seed_buckets(
                plan.shape[0],
                n_keys,
                rings,
                position[row],
                k_codes,
                key,
                flags,
                first,
                filled,
                start,
                generation,
                order,
                code,
            )
        for t0 in range(0, length, chunk):
            t1 = min(t0 + chunk, length)
            _list_keys(
                t0,
                t1,
                n_memory,
                clock,
                reset[b],
                plan,
                scores,
                slots,
                count,
                head,
                lowest,
                flags,
                key,
                n_keys,
                q_codes,
                k_codes,
                first,
                filled,
                start,
                generation,
                order,
                code,
                index,
                listed,
            )
            for t in range(t0, t1):
                n, mine = listed[t - t0], index[t - t0]
                if not backward:
                    target = y[b, t, h]
                    if n == 0:
                        target[:] = 0
                        continue
                    query = q[b, t, h]
                    for i in range(d_key):
                        x[i] = query[i] * factor
                    dots(x, keys, k_blocks, mine, n, logit)
                    softmax(logit, n, weight)
                    weighted(weight, values, v_blocks, mine, n, out)
                    for i in range(d_value):
                        target[i] = out[i]
                    continue
                target = dq[b, t, h]
                if n == 0:
                    target[:] = 0
                    continue
                query = q[b, t, h]
                for i in range(d_key):
                    x[i] = query[i] * factor
                given = dy[b, t, h]
                for i in range(d_value):
                    out[i] = given[i]
                dots(x, keys, k_blocks, mine, n, logit)
                softmax(logit, n, weight)
                dots(out, values, v_blocks, mine, n, slope)
                mean = dtype.type(0)
                for i in range(n):
                    mean += weight[i] * slope[i]
                for i in range(n):
                    slope[i] = weight[i] * (slope[i] - mean)
                spread(weight, out, v_blocks, mine, n, dv[row])
                spread(slope, x, k_blocks, mine, n, dk[row])
                weighted(slope, keys, k_blocks, mine, n, gx)
                for i in range(d_key):
                    target[i] = gx[i] * factor
        if not backward:
            _hand_over(
                n_keys,
                rings,
                clock,
                plan,
                slots,
                count,
                head,
                first,
                filled,
                start,
                generation,
                order,
                table[row],
            )


def attend(
    backward: bool, scale: float, tensors: tuple[Tensor, ...], chunk: int, budget: int, *decided: Tensor
) -> None:
    """``_run`` over all rows; ``tensors`` q, k, v, y, dy, dq, dk, dv and ``decided`` as it takes them."""
    batch, _, heads, _ = tensors[0].shape
    arguments: tuple[Any, ...] = (heads, backward, scale, *arrays(*tensors), chunk, budget, *arrays(*decided))
    over_rows(batch * heads, lambda begin, end: _run(begin, end, *arguments))
