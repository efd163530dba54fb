"""The delta rule one position after the other, the memory of a head kept in the first two levels of cache.

S_t = a_t S_{t-1} + b_t e_t k_t^T with e_t = v_t - c a_t S_{t-1} k_t, and y_t = S_t q_t; c is 1 (delta rule) or 0 (plain
decayed writes). A reset is a_t = 0. Rows of the forward and of the adjoint memory lie along keys and are vectorised
over values, two vectors at a time; the memory that backward runs through a second time lies the other way, so that no
sum is taken across a vector. Both axes are padded to two vectors.

Backward keeps no memories. With G_t the gradient by S_t, a sweep back in time gives du_t = G_t k_t, dv_t = b_t du_t and
G_{t-1} = a_t (G_t - c dv_t k_t^T) + dy_{t-1} q_{t-1}^T; a sweep forward gives dq_t = S_t^T dy_t and the rest of dk_t.
The decays follow from d log a_t = d log a_{t+1} + dy_t . y_t - dv_t . v_t, and d log a = 0 where a = 0; summed from
the end, it is exactly zero after the last position that counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.kernels.compiled import Array, arrays, kernel, over_rows
from recollect.ops.kernels.vectors import LANES, fma, load, row_sums, splat, store, times


def forward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, start: Tensor, delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y and e (B, L, H, P), and the last S (B, H, P, N). q, k (B, L, H, N); v (B, L, H, P); a, b (B, L, H)."""
    batch, _, n_heads, width = v.shape
    q, k, v, a, b = _padded(q), _padded(k), _padded(v), a.contiguous(), b.contiguous()
    memory = _own(_padded(_padded(start).mT), start)
    y, e = torch.empty_like(v), torch.empty_like(v)
    given: list[Any] = [*arrays(q, k, v, a, b, y, e, memory), delta]
    over_rows(batch * n_heads, lambda begin, end: _forward(begin, end, *given))
    return y[..., :width], e, memory.mT[..., :width, : start.shape[3]]


def backward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, e: Tensor, start: Tensor, last: Tensor, dy: Tensor,
    dlast: Tensor, delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by q, k, v, log a, b and the first S; ``e`` and ``last`` are what ``forward`` returned."""
    batch, _, n_heads, width = v.shape
    d_state = k.shape[3]
    q, k, v, dy, a, b = _padded(q), _padded(k), _padded(v), _padded(dy), a.contiguous(), b.contiguous()
    adjoint = _own(_padded(_padded(dlast).mT), dlast)
    memory = _own(_padded(_padded(start.mT).mT), start)
    ends = (dlast.double() * last).sum((-1, -2))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    db, dlog = torch.empty_like(b), torch.empty_like(a)
    inputs = arrays(q, k, v, a, b, e, dy)
    back: list[Any] = [*inputs, *arrays(dk, dv, db, adjoint), delta]
    again: list[Any] = [*inputs, *arrays(dq, dk, dv, dlog, memory, ends), delta]

    def run(begin: int, end: int) -> None:
        _back(begin, end, *back)
        _again(begin, end, *again)

    over_rows(batch * n_heads, run)
    return dq[..., :d_state], dk[..., :d_state], dv[..., :width], dlog, db, adjoint.mT[..., :width, :d_state]


def _padded(x: Tensor) -> Tensor:
    padding = -x.shape[-1] % (2 * LANES)
    return F.pad(x, (0, padding)).contiguous() if padding else x.contiguous()


def _own(x: Tensor, source: Tensor) -> Tensor:
    """x in memory that kernels may write to, which is not that of ``source``."""
    return x.clone() if x.data_ptr() == source.data_ptr() else x


@kernel
def _forward(
    begin: int, end: int,
    q: Array, k: Array, v: Array, a: Array, b: Array,
    y: Array, e: Array, memory: Array,
    delta: bool,
) -> None:  # fmt: skip
    length, n_heads, d_state, width = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    zero = v.dtype.type(0)
    S = np.empty((d_state, 2 * LANES), v.dtype)
    for row in range(begin, end):
        batch, head = row // n_heads, row % n_heads
        for p in range(0, width, 2 * LANES):
            w0 = w1 = splat(zero)
            for n in range(d_state):
                s0, s1 = load(memory[batch, head, n], p), load(memory[batch, head, n], p + LANES)
                store(S[n], 0, s0)
                store(S[n], LANES, s1)
                k_n = splat(k[batch, 0, head, n])
                w0, w1 = fma(k_n, s0, w0), fma(k_n, s1, w1)
            for t in range(length):
                a_t = splat(a[batch, t, head])
                minus = splat(-a[batch, t, head] if delta else zero)
                e0 = fma(minus, w0, load(v[batch, t, head], p))
                e1 = fma(minus, w1, load(v[batch, t, head], p + LANES))
                store(e[batch, t, head], p, e0)
                store(e[batch, t, head], p + LANES, e1)
                b_t = splat(b[batch, t, head])
                u0, u1 = times(b_t, e0), times(b_t, e1)
                k_t, q_t, k_next = k[batch, t, head], q[batch, t, head], k[batch, min(t + 1, length - 1), head]
                y0 = y1 = w0 = w1 = splat(zero)
                for n in range(d_state):
                    k_n, q_n, next_n = splat(k_t[n]), splat(q_t[n]), splat(k_next[n])
                    s0 = fma(k_n, u0, times(a_t, load(S[n], 0)))
                    s1 = fma(k_n, u1, times(a_t, load(S[n], LANES)))
                    store(S[n], 0, s0)
                    store(S[n], LANES, s1)
                    y0, y1 = fma(q_n, s0, y0), fma(q_n, s1, y1)
                    if delta:
                        w0, w1 = fma(next_n, s0, w0), fma(next_n, s1, w1)
                store(y[batch, t, head], p, y0)
                store(y[batch, t, head], p + LANES, y1)
            for n in range(d_state):
                store(memory[batch, head, n], p, load(S[n], 0))
                store(memory[batch, head, n], p + LANES, load(S[n], LANES))


@kernel
def _back(
    begin: int, end: int,
    q: Array, k: Array, v: Array, a: Array, b: Array, e: Array, dy: Array,
    dk: Array, dv: Array, db: Array, adjoint: Array,
    delta: bool,
) -> None:  # fmt: skip
    """Back in time: dv, db, the first part of dk (G_t^T b_t e_t), and ``adjoint`` from last to first."""
    length, n_heads, d_state, width = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    zero, one = v.dtype.type(0), v.dtype.type(1)
    G = np.empty((d_state, 2 * LANES), v.dtype)
    products = np.empty((LANES, LANES), v.dtype)
    for row in range(begin, end):
        batch, head = row // n_heads, row % n_heads
        for p in range(0, width, 2 * LANES):
            for n in range(d_state):
                store(G[n], 0, load(adjoint[batch, head, n], p))
                store(G[n], LANES, load(adjoint[batch, head, n], p + LANES))
            scale, minus = one, zero
            g0 = g1 = splat(zero)
            for back in range(length):
                t = length - 1 - back
                k_t, q_t, k_next = k[batch, t, head], q[batch, t, head], k[batch, min(t + 1, length - 1), head]
                a_next = splat(scale)
                c0, c1 = times(splat(minus), g0), times(splat(minus), g1)
                y0, y1 = load(dy[batch, t, head], p), load(dy[batch, t, head], p + LANES)
                e0, e1 = load(e[batch, t, head], p), load(e[batch, t, head], p + LANES)
                b_t = splat(b[batch, t, head])
                u0, u1 = times(b_t, e0), times(b_t, e1)
                d0 = d1 = splat(zero)
                dk_t = dk[batch, t, head]
                for first in range(0, d_state, LANES):
                    for i in range(LANES):
                        n = first + i
                        next_n, q_n, k_n = splat(k_next[n]), splat(q_t[n]), splat(k_t[n])
                        g0, g1 = times(a_next, load(G[n], 0)), times(a_next, load(G[n], LANES))
                        if delta:
                            g0, g1 = fma(next_n, c0, g0), fma(next_n, c1, g1)
                        g0, g1 = fma(q_n, y0, g0), fma(q_n, y1, g1)
                        store(G[n], 0, g0)
                        store(G[n], LANES, g1)
                        d0, d1 = fma(k_n, g0, d0), fma(k_n, g1, d1)
                        store(products[i], 0, fma(u1, g1, times(u0, g0)))
                    sums = row_sums(products, 0)
                    if p > 0:
                        sums = fma(splat(one), sums, load(dk_t, first))
                    store(dk_t, first, sums)
                store(products[0], 0, fma(d1, e1, times(d0, e0)))
                error = zero
                for i in range(LANES):
                    error += products[0, i]
                db[batch, t, head] = error if p == 0 else db[batch, t, head] + error
                g0, g1 = times(b_t, d0), times(b_t, d1)
                store(dv[batch, t, head], p, g0)
                store(dv[batch, t, head], p + LANES, g1)
                scale = a[batch, t, head]
                minus = -scale if delta else zero
            a_next = splat(scale)
            c0, c1 = times(splat(minus), g0), times(splat(minus), g1)
            for n in range(d_state):
                next_n = splat(k[batch, 0, head, n])
                store(adjoint[batch, head, n], p, fma(next_n, c0, times(a_next, load(G[n], 0))))
                store(adjoint[batch, head, n], p + LANES, fma(next_n, c1, times(a_next, load(G[n], LANES))))


@kernel
def _again(
    begin: int, end: int,
    q: Array, k: Array, v: Array, a: Array, b: Array, e: Array, dy: Array,
    dq: Array, dk: Array, dv: Array, dlog: Array, memory: Array, ends: Array,
    delta: bool,
) -> None:  # fmt: skip
    """Forward in time, after ``_back``: dq, the second part of dk (-a_t S_{t-1}^T dv_t), and the decays."""
    length, n_heads, d_state, width = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    zero = v.dtype.type(0)
    S = np.empty((width, 2 * LANES), v.dtype)
    for row in range(begin, end):
        batch, head = row // n_heads, row % n_heads
        for n in range(0, d_state, 2 * LANES):
            w0 = w1 = splat(zero)
            for p in range(width):
                s0, s1 = load(memory[batch, head, p], n), load(memory[batch, head, p], n + LANES)
                store(S[p], 0, s0)
                store(S[p], LANES, s1)
                dv_p = splat(dv[batch, 0, head, p])
                w0, w1 = fma(dv_p, s0, w0), fma(dv_p, s1, w1)
            for t in range(length):
                a_t = splat(a[batch, t, head])
                dk_t = dk[batch, t, head]
                if delta:
                    minus = splat(-a[batch, t, head])
                    store(dk_t, n, fma(minus, w0, load(dk_t, n)))
                    store(dk_t, n + LANES, fma(minus, w1, load(dk_t, n + LANES)))
                b_t = splat(b[batch, t, head])
                k0, k1 = times(b_t, load(k[batch, t, head], n)), times(b_t, load(k[batch, t, head], n + LANES))
                e_t, dy_t, dv_next = e[batch, t, head], dy[batch, t, head], dv[batch, min(t + 1, length - 1), head]
                q0 = q1 = w0 = w1 = splat(zero)
                for p in range(width):
                    e_p, dy_p, dv_p = splat(e_t[p]), splat(dy_t[p]), splat(dv_next[p])
                    s0 = fma(e_p, k0, times(a_t, load(S[p], 0)))
                    s1 = fma(e_p, k1, times(a_t, load(S[p], LANES)))
                    store(S[p], 0, s0)
                    store(S[p], LANES, s1)
                    q0, q1 = fma(dy_p, s0, q0), fma(dy_p, s1, q1)
                    if delta:
                        w0, w1 = fma(dv_p, s0, w0), fma(dv_p, s1, w1)
                store(dq[batch, t, head], n, q0)
                store(dq[batch, t, head], n + LANES, q1)
        change = ends[batch, head]
        for back in range(length):
            t = length - 1 - back
            for n in range(d_state):
                change += np.float64(q[batch, t, head, n]) * np.float64(dq[batch, t, head, n])
            for p in range(width):
                change -= np.float64(v[batch, t, head, p]) * np.float64(dv[batch, t, head, p])
            if a[batch, t, head] == zero:
                change = 0.0
            dlog[batch, t, head] = change
