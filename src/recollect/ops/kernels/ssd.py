"""The state-space dual, chunk after chunk in cache: one (batch row, group, share of the group's heads) at a time.

Inside a chunk with l_q = A (dt_0 + ... + dt_q) the outputs of a head are

    y = M x + (e^l C) S + D x,  M_qs = (C_q . B_s) e^(l_q - l_s) dt_s for s <= q,

and the state S (N x P) at its start becomes e^(l_end) S + (e^(l_end - l) dt B)^T x. A reset at r cuts M between s < r
and q >= r, stops S from being read at r and after, and keeps what was before r out of the next state. The (Q, Q) arrays
live in cache and are made again in backward; only the states at the starts of chunks are stored.

N and P are multiples of 4, Q of 4; positions past the end count as dt = x = B = C = 0 and change nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.ops.kernels.compiled import Array, arrays, exp, kernel, over_rows
from recollect.ops.kernels.product import add_product, add_product_transposed, lower_product

__all__ = ["arrays", "backward", "forward", "over_rows"]


@kernel
def _load(target: Array, source: Array, b: int, begin: int, middle: int) -> None:
    """target (Q, W) = source[b, begin : begin + Q, middle], zero past the end."""
    length = source.shape[1]
    for q in range(target.shape[0]):
        to = target[q]
        if begin + q < length:
            row = source[b, begin + q, middle]
            for i in range(to.shape[0]):
                to[i] = row[i]
        else:
            for i in range(to.shape[0]):
                to[i] = 0


@kernel
def _transpose(target: Array, source: Array) -> None:
    """In tiles of 8 rows of the source, so that lines of the target are written whole while they are near."""
    for block in range((source.shape[0] + 7) // 8):
        begin = 8 * block
        count = min(8, source.shape[0] - begin)
        for j in range(source.shape[1]):
            to = target[j, begin : begin + count]
            for i in range(count):
                to[i] = source[begin + i, j]


@kernel
def _segments(first: Array, reset: Array, b: int, begin: int) -> tuple[int, int]:
    """first_q: where the segment of position q starts within its chunk. Also the first reset (Q if none) and the last
    (0 if none).
    """
    size = first.shape[0]
    earliest, latest = size, 0
    for q in range(size):
        if reset.shape[1] > begin + q and reset[b, begin + q]:
            earliest, latest = min(earliest, q), q
        first[q] = latest
    return earliest, latest


@kernel
def _decays(
    step: Array, log: Array, head: Array, tail: Array, dt: Array, A: Array, b: int, begin: int, h: int, cut: Array
) -> Any:
    """dt_q, l_q, e^l_q where the first state is seen, e^(l_end - l_q) where the next one sees q; returns e^l_end."""
    size, length = step.shape[0], dt.shape[1]
    zero = step.dtype.type(0)
    total = zero
    a = A[h]
    for q in range(size):
        value = dt[b, begin + q, h] if begin + q < length else zero
        total += value * a
        step[q] = value
        log[q] = total
    for q in range(size):
        head[q] = exp(log[q])
        tail[q] = exp(total - log[q])
    whole = head[size - 1]
    for q in range(size - cut[0]):
        head[cut[0] + q] = 0
        whole = zero
    for q in range(cut[1]):
        tail[q] = 0
    return whole


@kernel
def _decay_row(row: Array, q: int, log: Array, low: int) -> int:
    """row_s = e^(l_q - l_s) for low <= s <= q and 0 around it; returns how many entries were written."""
    count = min((q + 16) // 16 * 16, row.shape[0])
    here = log[q]
    zero = log.dtype.type(0)
    for s in range(count):
        row[s] = exp(min(here - log[s], zero))
    for s in range(low):
        row[s] = 0
    after = row[q + 1 : count]
    for s in range(after.shape[0]):
        after[s] = 0
    return count


@kernel
def _scale_rows(target: Array, source: Array, factor: Array) -> None:
    for q in range(target.shape[0]):
        to, row, f = target[q], source[q], factor[q]
        for i in range(to.shape[0]):
            to[i] = row[i] * f


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
    kind = x.dtype
    keys, keys_t = np.empty((size, d_state), kind), np.empty((d_state, size), kind)
    queries, scaled = np.empty((size, d_state), kind), np.empty((size, d_state), kind)
    scores, mixing = np.empty((size, size), kind), np.zeros((size, size), kind)
    xs, ys = np.empty((size, width), kind), np.empty((size, width), kind)
    step, log, head, tail = np.empty(size, kind), np.empty(size, kind), np.empty(size, kind), np.empty(size, kind)
    first, cut = np.zeros(size, np.int64), np.zeros(2, np.int64)
    for unit in range(begin, end):
        b, rest = unit // (n_groups * parts), unit % (n_groups * parts)
        g, part = rest // parts, rest % parts
        low_head, high_head = per_group * part // parts, per_group * (part + 1) // parts
        for chunk in range((length + size - 1) // size):
            at = chunk * size
            cut[0], cut[1] = _segments(first, reset, b, at)
            _load(keys, B, b, at, g)
            _load(queries, C, b, at, g)
            _transpose(keys_t, keys)
            lower_product(scores, queries, keys_t)
            for h in range(g * per_group + low_head, g * per_group + high_head):
                S = state[b, h]
                if starts.shape[1] > 0:
                    starts[b, chunk, h] = S
                total = _decays(step, log, head, tail, dt, A, b, at, h, cut)
                _load(xs, x, b, at, h)
                skip = D[h]
                for q in range(size):
                    yq, xq = ys[q], xs[q]
                    for i in range(width):
                        yq[i] = xq[i] * skip
                    row, score = mixing[q], scores[q]
                    count = _decay_row(row, q, log, first[q])
                    for s in range(count):
                        row[s] = row[s] * score[s] * step[s]
                add_product(ys, mixing, xs, True)
                _scale_rows(scaled, queries, head)
                add_product(ys, scaled, S, False)
                for q in range(min(size, length - at)):
                    to, yq = y[b, at + q, h], ys[q]
                    for i in range(width):
                        to[i] = yq[i]
                for q in range(size):
                    tail[q] *= step[q]
                _scale_rows(scaled, keys, tail)
                for n in range(d_state):
                    row = S[n]
                    for i in range(width):
                        row[i] *= total
                add_product_transposed(S, scaled, xs, False)


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
    keys, keys_t = np.empty((size, d_state), kind), np.empty((d_state, size), kind)
    queries, queries_t = np.empty((size, d_state), kind), np.empty((d_state, size), kind)
    scaled, inner = np.empty((size, d_state), kind), np.empty((d_state, size), kind)
    dkeys_t, dqueries_t = np.empty((d_state, size), kind), np.empty((d_state, size), kind)
    dkeys, dqueries = np.empty((size, d_state), kind), np.empty((size, d_state), kind)
    scores, dscores = np.empty((size, size), kind), np.empty((size, size), kind)
    mixing, dmixing = np.zeros((size, size), kind), np.empty((size, size), kind)
    xs, xs_t = np.empty((size, width), kind), np.empty((width, size), kind)
    dys, dys_t, dxs = np.empty((size, width), kind), np.empty((width, size), kind), np.empty((size, width), kind)
    step, log, head, tail = np.empty(size, kind), np.empty(size, kind), np.empty(size, kind), np.empty(size, kind)
    dstep, dlog, column = np.empty(size, kind), np.empty(size, kind), np.empty(size, kind)
    first, cut = np.zeros(size, np.int64), np.zeros(2, np.int64)
    zero = kind.type(0)
    n_chunks = (length + size - 1) // size
    for unit in range(begin, end):
        b, rest = unit // (n_groups * parts), unit % (n_groups * parts)
        g, part = rest // parts, rest % parts
        low_head, high_head = per_group * part // parts, per_group * (part + 1) // parts
        for back in range(n_chunks):
            chunk = n_chunks - 1 - back
            at = chunk * size
            here = min(size, length - at)
            cut[0], cut[1] = _segments(first, reset, b, at)
            _load(keys, B, b, at, g)
            _load(queries, C, b, at, g)
            _transpose(keys_t, keys)
            _transpose(queries_t, queries)
            lower_product(scores, queries, keys_t)
            dscores[:] = 0
            dkeys_t[:] = 0
            dqueries_t[:] = 0
            for h in range(g * per_group + low_head, g * per_group + high_head):
                S, dS = starts[b, chunk, h], dstate[b, h]
                total = _decays(step, log, head, tail, dt, A, b, at, h, cut)
                _load(xs, x, b, at, h)
                _load(dys, dy, b, at, h)
                _transpose(xs_t, xs)
                _transpose(dys_t, dys)
                skip, dskip = D[h], zero
                lower_product(dmixing, dys, xs_t)
                column[:] = 0
                for q in range(size):
                    dyq, xq, dxq = dys[q], xs[q], dxs[q]
                    for i in range(width):
                        dxq[i] = dyq[i] * skip
                        dskip += dyq[i] * xq[i]
                    row, score, drow, dscore = mixing[q], scores[q], dmixing[q], dscores[q]
                    count = _decay_row(row, q, log, first[q])
                    across = zero
                    for s in range(count):
                        decayed = row[s] * drow[s]
                        dscore[s] += decayed * step[s]
                        decayed *= score[s]
                        column[s] += decayed
                        across += decayed * step[s]
                        row[s] = row[s] * score[s] * step[s]
                    dlog[q] = across
                dD[b, h] += dskip
                for q in range(size):
                    dstep[q] = column[q]
                    dlog[q] -= column[q] * step[q]
                add_product_transposed(dxs, mixing, dys, True)

                # What was read from the state at the start of the chunk.
                inner[:] = 0
                add_product(inner, S, dys_t, False)
                column[:] = 0
                for n in range(d_state):
                    found, to, query = inner[n], dqueries_t[n], queries_t[n]
                    for q in range(size):
                        to[q] += found[q] * head[q]
                        column[q] += found[q] * query[q]
                for q in range(size):
                    dlog[q] += column[q] * head[q]

                # What the chunk wrote into the next state.
                inner[:] = 0
                add_product(inner, dS, xs_t, False)
                column[:] = 0
                for n in range(d_state):
                    found, to, key = inner[n], dkeys_t[n], keys_t[n]
                    for q in range(size):
                        to[q] += found[q] * (tail[q] * step[q])
                        column[q] += found[q] * key[q]
                at_end = zero
                for q in range(size):
                    dstep[q] += column[q] * tail[q]
                    tail[q] *= step[q]
                    moved = column[q] * tail[q]
                    dlog[q] -= moved
                    at_end += moved
                _scale_rows(scaled, keys, tail)
                add_product(dxs, scaled, dS, False)

                kept = zero
                for n in range(d_state):
                    row, drow = S[n], dS[n]
                    for i in range(width):
                        kept += row[i] * drow[i]
                        drow[i] *= total
                dlog[size - 1] += at_end + kept * total
                _scale_rows(scaled, queries, head)
                add_product_transposed(dS, scaled, dys, False)

                later = zero
                dslope = zero
                for q in range(here):
                    p = here - 1 - q
                    later += dlog[p]
                    if q == 0 and here < size:
                        later += dlog[size - 1]
                    ddt[b, at + p, h] = dstep[p] + later * A[h]
                    dslope += later * step[p]
                dA[b, h] += dslope
                for q in range(here):
                    to, dxq = dx[b, at + q, h], dxs[q]
                    for i in range(width):
                        to[i] = dxq[i]
            _transpose(dkeys, dkeys_t)
            _transpose(dqueries, dqueries_t)
            add_product(dqueries, dscores, keys, True)
            add_product_transposed(dkeys, dscores, queries, True)
            for q in range(here):
                dB[part, b, at + q, g] = dkeys[q]
                dC[part, b, at + q, g] = dqueries[q]
