"""The state-space dual position after position: one (batch row, group, share of the group's heads) at a time.

With few states N the recurrence itself is less work than the (Q, Q) arrays of ``kernels.ssd``: N multiplications per
channel to decay, to write and to read. The channels of a unit are the lanes, N rows of them its state, in cache. Only
states at the starts of chunks are stored; backward makes those of a chunk again. A reset is a decay of zero.

N is a multiple of 4. Arguments and results are those of ``kernels.ssd``, so that either can be taken.
"""

from __future__ import annotations

import numpy as np

from recollect.ops.kernels.compiled import Array, arrays, exp, kernel, over_rows
from recollect.ops.kernels.vectors import LANES, fma, load, plus, splat, store, times, total

__all__ = ["arrays", "backward", "forward", "over_rows"]


@kernel
def _copy(target: Array, target_at: int, source: Array, source_at: int, count: int) -> None:
    if count % LANES == 0:
        for v in range(count // LANES):
            store(target, target_at + v * LANES, load(source, source_at + v * LANES))
    else:
        to, row = target[target_at : target_at + count], source[source_at : source_at + count]
        for i in range(count):
            to[i] = row[i]


@kernel
def _spread(target: Array, source: Array, at: int, heads: int, width: int) -> None:
    """target[h * width + i] = source[at + h]."""
    for h in range(heads):
        if width % LANES == 0:
            value = splat(source[at + h])
            for j in range(width // LANES):
                store(target, h * width + j * LANES, value)
        else:
            part = target[h * width : (h + 1) * width]
            for i in range(width):
                part[i] = source[at + h]


@kernel
def _decays(decay: Array, dt: Array, A: Array, reset: Array, b: int, at: int, count: int, low: int, heads: int) -> None:
    """decay[q * heads + h] = e^(dt A), 0 at a reset."""
    for q in range(count):
        for h in range(heads):
            decay[q * heads + h] = dt[b, at + q, low + h] * A[low + h]
    for i in range(count * heads):
        decay[i] = exp(decay[i])
    if reset.shape[1] > 0:
        for q in range(count):
            if reset[b, at + q]:
                for h in range(heads):
                    decay[q * heads + h] = 0


@kernel
def _state_in(S: Array, state: Array, state_at: int, heads: int, d_state: int, width: int) -> None:
    """Rows of lanes S (N, padded) from heads of (N, P)."""
    padded = S.shape[0] // d_state
    for h in range(heads):
        for n in range(d_state):
            _copy(S, n * padded + h * width, state, state_at + (h * d_state + n) * width, width)


@kernel
def _state_out(state: Array, state_at: int, S: Array, heads: int, d_state: int, width: int) -> None:
    padded = S.shape[0] // d_state
    for h in range(heads):
        for n in range(d_state):
            _copy(state, state_at + (h * d_state + n) * width, S, n * padded + h * width, width)


@kernel
def _advance(
    S: Array, before: int, after: int, padded: int, write: Array, keys: Array, keys_at: int, d_state: int, decay: Array
) -> None:
    """The state S[after:] is decay S[before:] + B write^T."""
    for four in range(d_state // 4):
        n = 4 * four
        b0, b1, b2, b3 = (
            splat(keys[keys_at + n]),
            splat(keys[keys_at + n + 1]),
            splat(keys[keys_at + n + 2]),
            splat(keys[keys_at + n + 3]),
        )
        for v in range(padded // LANES):
            i = v * LANES
            a, w = load(decay, i), load(write, i)
            j, k = before + n * padded + i, after + n * padded + i
            store(S, k, fma(load(S, j), a, times(w, b0)))
            store(S, k + padded, fma(load(S, j + padded), a, times(w, b1)))
            store(S, k + 2 * padded, fma(load(S, j + 2 * padded), a, times(w, b2)))
            store(S, k + 3 * padded, fma(load(S, j + 3 * padded), a, times(w, b3)))


@kernel
def forward(
    begin: int,
    end: int,
    parts: int,
    size: int,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    reset: Array,
    state: Array,
    y: Array,
    starts: Array,
) -> None:
    """y (B, L, H, P) and, in place, ``state`` (B, H, N, P); ``starts`` (B, chunks or 0, H, N, P) gets chunk starts."""
    length, n_heads, width = x.shape[1], x.shape[2], x.shape[3]
    n_groups, d_state = B.shape[2], B.shape[3]
    per_group = n_heads // n_groups
    xs, ys, keys, queries = x.reshape(-1), y.reshape(-1), B.reshape(-1), C.reshape(-1)
    states, kept, steps = state.reshape(-1), starts.reshape(-1), dt.reshape(-1)
    lanes = ((per_group + parts - 1) // parts * width + LANES - 1) // LANES * LANES
    S, out = np.zeros(d_state * lanes, x.dtype), np.zeros(lanes, x.dtype)
    row, write = np.zeros(lanes, x.dtype), np.zeros(lanes, x.dtype)
    decay, step, skip = np.zeros(lanes, x.dtype), np.zeros(lanes, x.dtype), np.zeros(lanes, x.dtype)
    decays = np.empty(size * per_group, x.dtype)
    for unit in range(begin, end):
        b, rest = unit // (n_groups * parts), unit % (n_groups * parts)
        g, part = rest // parts, rest % parts
        low = g * per_group + per_group * part // parts
        heads = g * per_group + per_group * (part + 1) // parts - low
        _state_in(S, states, (b * n_heads + low) * d_state * width, heads, d_state, width)
        _spread(skip, D, low, heads, width)
        for t in range(length):
            if t % size == 0:
                _decays(decays, dt, A, reset, b, t, min(size, length - t), low, heads)
                if starts.shape[1] > 0:
                    at = ((b * starts.shape[1] + t // size) * n_heads + low) * d_state * width
                    _state_out(kept, at, S, heads, d_state, width)
            at = ((b * length + t) * n_heads + low) * width
            _copy(row, 0, xs, at, heads * width)
            _spread(decay, decays, t % size * heads, heads, width)
            _spread(step, steps, (b * length + t) * n_heads + low, heads, width)
            for v in range(lanes // LANES):
                i = v * LANES
                store(write, i, times(load(row, i), load(step, i)))
                store(out, i, times(load(row, i), load(skip, i)))
            here = ((b * length + t) * n_groups + g) * d_state
            _advance(S, 0, 0, lanes, write, keys, here, d_state, decay)
            for four in range(d_state // 4):
                n = here + 4 * four
                c0, c1, c2, c3 = splat(queries[n]), splat(queries[n + 1]), splat(queries[n + 2]), splat(queries[n + 3])
                for v in range(lanes // LANES):
                    i = v * LANES
                    j = 4 * four * lanes + i
                    read = fma(load(S, j), c0, load(out, i))
                    read = fma(load(S, j + lanes), c1, read)
                    read = fma(load(S, j + 2 * lanes), c2, read)
                    store(out, i, fma(load(S, j + 3 * lanes), c3, read))
            _copy(ys, at, out, 0, heads * width)
        _state_out(states, (b * n_heads + low) * d_state * width, S, heads, d_state, width)


@kernel
def _sum_heads(target: Array, at: int, source: Array, heads: int, width: int) -> None:
    """target[at + h] = the sum of source over the lanes of head h."""
    for h in range(heads):
        if width % LANES == 0:
            summed = load(source, h * width)
            for j in range(1, width // LANES):
                summed = plus(summed, load(source, h * width + j * LANES))
            target[at + h] = total(summed)
        else:
            part = source[h * width : (h + 1) * width]
            found = source.dtype.type(0)
            for i in range(width):
                found += part[i]
            target[at + h] = found


@kernel
def backward(
    begin: int,
    end: int,
    parts: int,
    size: int,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    reset: Array,
    starts: Array,
    dy: Array,
    dstate: Array,
    dx: Array,
    ddt: Array,
    dA: Array,
    dB: Array,
    dC: Array,
    dD: Array,
) -> None:
    """Gradients; ``dstate`` (B, H, N, P) holds the last state's and is left as the first one's. dA and dD (B, H) and
    dB and dC (parts, B, L, G, N) are still to be summed over their first axis.
    """
    length, n_heads, width = x.shape[1], x.shape[2], x.shape[3]
    n_groups, d_state = B.shape[2], B.shape[3]
    per_group = n_heads // n_groups
    kind = x.dtype
    xs, dys, dxs, keys, queries = x.reshape(-1), dy.reshape(-1), dx.reshape(-1), B.reshape(-1), C.reshape(-1)
    dstates, kept, steps = dstate.reshape(-1), starts.reshape(-1), dt.reshape(-1)
    dkeys, dqueries = dB.reshape(-1), dC.reshape(-1)
    lanes = ((per_group + parts - 1) // parts * width + LANES - 1) // LANES * LANES
    block = d_state * lanes
    # The state at the start of the chunk, then those after each of its positions.
    S, first, dS = np.zeros((size + 1) * block, kind), np.zeros(block, kind), np.zeros(block, kind)
    row, drow, write = np.zeros(lanes, kind), np.zeros(lanes, kind), np.zeros(lanes, kind)
    decay, step, skip = np.zeros(lanes, kind), np.zeros(lanes, kind), np.zeros(lanes, kind)
    dwrite, slope, dskip = np.zeros(lanes, kind), np.zeros(lanes, kind), np.zeros(lanes, kind)
    decays, by_step, by_decay = np.empty(size * per_group, kind), np.empty(per_group, kind), np.empty(per_group, kind)
    zero = kind.type(0)
    for unit in range(begin, end):
        b, rest = unit // (n_groups * parts), unit % (n_groups * parts)
        g, part = rest // parts, rest % parts
        low = g * per_group + per_group * part // parts
        heads = g * per_group + per_group * (part + 1) // parts - low
        state_at = (b * n_heads + low) * d_state * width
        # Sums over lanes must not meet what a unit with more heads left behind.
        for each in (first, dS, row, drow, decay, step, skip, dskip):
            each[:] = 0
        _state_in(dS, dstates, state_at, heads, d_state, width)
        _spread(skip, D, low, heads, width)
        for back in range((length + size - 1) // size):
            chunk = (length - 1) // size - back
            t0 = chunk * size
            count = min(size, length - t0)
            _decays(decays, dt, A, reset, b, t0, count, low, heads)
            start_at = ((b * starts.shape[1] + chunk) * n_heads + low) * d_state * width
            _state_in(first, kept, start_at, heads, d_state, width)
            _copy(S, 0, first, 0, block)
            for q in range(count):
                t = t0 + q
                _copy(row, 0, xs, ((b * length + t) * n_heads + low) * width, heads * width)
                _spread(decay, decays, q * heads, heads, width)
                _spread(step, steps, (b * length + t) * n_heads + low, heads, width)
                for v in range(lanes // LANES):
                    store(write, v * LANES, times(load(row, v * LANES), load(step, v * LANES)))
                here = ((b * length + t) * n_groups + g) * d_state
                _advance(S, q * block, (q + 1) * block, lanes, write, keys, here, d_state, decay)
            for reverse in range(count):
                q = count - 1 - reverse
                t = t0 + q
                at = ((b * length + t) * n_heads + low) * width
                _copy(row, 0, xs, at, heads * width)
                _copy(drow, 0, dys, at, heads * width)
                _spread(decay, decays, q * heads, heads, width)
                _spread(step, steps, (b * length + t) * n_heads + low, heads, width)
                for v in range(lanes // LANES):
                    i = v * LANES
                    store(write, i, times(load(row, i), load(step, i)))
                    store(dskip, i, fma(load(row, i), load(drow, i), load(dskip, i)))
                    store(dwrite, i, splat(zero))
                    store(slope, i, splat(zero))
                here = ((b * length + t) * n_groups + g) * d_state
                into = here + part * (dkeys.shape[0] // parts)
                for four in range(d_state // 4):
                    n = here + 4 * four
                    b0, b1, b2, b3 = splat(keys[n]), splat(keys[n + 1]), splat(keys[n + 2]), splat(keys[n + 3])
                    c0, c1 = splat(queries[n]), splat(queries[n + 1])
                    c2, c3 = splat(queries[n + 2]), splat(queries[n + 3])
                    db0, db1, db2, db3 = splat(zero), splat(zero), splat(zero), splat(zero)
                    dc0, dc1, dc2, dc3 = splat(zero), splat(zero), splat(zero), splat(zero)
                    for v in range(lanes // LANES):
                        i = v * LANES
                        j = 4 * four * lanes + i
                        before = q * block + j
                        after = before + block
                        a, w, grad = load(decay, i), load(write, i), load(drow, i)
                        dc0 = fma(grad, load(S, after), dc0)
                        dc1 = fma(grad, load(S, after + lanes), dc1)
                        dc2 = fma(grad, load(S, after + 2 * lanes), dc2)
                        dc3 = fma(grad, load(S, after + 3 * lanes), dc3)
                        s0 = fma(grad, c0, load(dS, j))
                        s1 = fma(grad, c1, load(dS, j + lanes))
                        s2 = fma(grad, c2, load(dS, j + 2 * lanes))
                        s3 = fma(grad, c3, load(dS, j + 3 * lanes))
                        db0, db1, db2, db3 = fma(s0, w, db0), fma(s1, w, db1), fma(s2, w, db2), fma(s3, w, db3)
                        written = fma(s1, b1, fma(s0, b0, load(dwrite, i)))
                        store(dwrite, i, fma(s3, b3, fma(s2, b2, written)))
                        met = fma(s1, load(S, before + lanes), fma(s0, load(S, before), load(slope, i)))
                        met = fma(s2, load(S, before + 2 * lanes), met)
                        store(slope, i, fma(s3, load(S, before + 3 * lanes), met))
                        store(dS, j, times(s0, a))
                        store(dS, j + lanes, times(s1, a))
                        store(dS, j + 2 * lanes, times(s2, a))
                        store(dS, j + 3 * lanes, times(s3, a))
                    n = into + 4 * four
                    dkeys[n], dkeys[n + 1], dkeys[n + 2], dkeys[n + 3] = total(db0), total(db1), total(db2), total(db3)
                    dqueries[n], dqueries[n + 1] = total(dc0), total(dc1)
                    dqueries[n + 2], dqueries[n + 3] = total(dc2), total(dc3)
                for v in range(lanes // LANES):
                    i = v * LANES
                    moved = load(dwrite, i)
                    store(dwrite, i, times(moved, load(row, i)))
                    store(write, i, fma(moved, load(step, i), times(load(drow, i), load(skip, i))))
                _copy(dxs, at, write, 0, heads * width)
                _sum_heads(by_step, 0, dwrite, heads, width)
                _sum_heads(by_decay, 0, slope, heads, width)
                for h in range(heads):
                    along = by_decay[h] * decays[q * heads + h]
                    ddt[b, t, low + h] = by_step[h] + along * A[low + h]
                    dA[b, low + h] += along * dt[b, t, low + h]
        _sum_heads(by_step, 0, dskip, heads, width)
        for h in range(heads):
            dD[b, low + h] += by_step[h]
        _state_out(dstates, state_at, dS, heads, d_state, width)
