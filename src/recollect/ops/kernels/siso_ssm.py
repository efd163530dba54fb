"""Compiled diagonal state-space models with one input and one output per channel: forward, and its adjoint.

Lanes are channels: ``LANES`` of them are worked on together, so that u (B, L, D) is read as it lies. What belongs to
one pair of states is one row of ``pair``, and what belongs to four positions is one stretch of ``tile``: with constant
distances inside each, the compiler sees that nothing overlaps, and vectorises. Four positions are taken per visit to a
pair, so that its state stays in registers.

Parameters and states come with lanes last and blocks of lanes first: (blocks, P, parts, LANES).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import Tensor

from recollect.ops.kernels.compiled import Array, arrays, kernel, over_rows

LANES: Final = 64
"""Widths are rounded up to this: 64 lanes hide the latency of a pair best (16 take 1.25 times as long, 32 take 1.4)."""


def run_forward(n_blocks: int, *tensors: Tensor) -> None:
    """``forward`` over all blocks."""
    given = arrays(*tensors)
    over_rows(n_blocks, lambda begin, end: forward(begin, end, *given))


def run_backward(n_blocks: int, *tensors: Tensor) -> None:
    """``backward`` over all blocks."""
    given = arrays(*tensors)
    over_rows(n_blocks, lambda begin, end: backward(begin, end, *given))


@kernel
def forward(
    begin: int,
    end: int,
    u: Array,
    reset: Array,
    system: Array,
    skip: Array,
    start: Array,
    y: Array,
    last: Array,
) -> None:
    """y (B, L, D) and ``last`` for blocks ``begin..end``: h_t = a h_{t-1} + u_t, y_t = Re(c h_t) + skip u_t.

    reset (B, L), or (B, 0) for none; system (blocks, P, 4, LANES) holds Re a, Im a, Re c, -Im c; skip (blocks, LANES);
    start and last (B, blocks, P, 2, LANES).
    """
    batch, length, width = u.shape
    n_pairs = system.shape[1]
    resets = reset.shape[1] > 0
    pair = np.zeros((n_pairs, 6 * LANES), u.dtype)
    tile = np.zeros(8 * LANES, u.dtype)
    for n in range(begin, end):
        offset = n * LANES
        lanes = min(LANES, width - offset)
        for p in range(n_pairs):
            _load(system[n, p], pair[p, 2 * LANES :])
        for b in range(batch):
            for p in range(n_pairs):
                _load(start[b, n, p], pair[p, : 2 * LANES])
            t = 0
            while t < length:
                if resets and reset[b, t]:
                    pair[:, : 2 * LANES] = 0
                size = _run_length(reset[b], t, length) if resets else min(4, length - t)
                for s in range(size):
                    _feed(u[b, t + s, offset : offset + lanes], skip[n], tile[2 * s * LANES : 2 * (s + 1) * LANES])
                if size == 4:
                    for p in range(n_pairs):
                        _four(pair[p], tile)
                else:
                    for s in range(size):
                        for p in range(n_pairs):
                            _one(pair[p], tile[2 * s * LANES : 2 * (s + 1) * LANES])
                for s in range(size):
                    _store(tile[(2 * s + 1) * LANES : 2 * (s + 1) * LANES], y[b, t + s, offset : offset + lanes])
                t += size
            for p in range(n_pairs):
                for k in range(2):
                    _store(pair[p, k * LANES : (k + 1) * LANES], last[b, n, p, k])


@kernel
def backward(
    begin: int,
    end: int,
    u: Array,
    dy: Array,
    reset: Array,
    system: Array,
    skip: Array,
    start: Array,
    dlast: Array,
    du: Array,
    dsystem: Array,
    dskip: Array,
    dstart: Array,
) -> None:
    """The adjoint for blocks ``begin..end``: du (B, L, D), and per row dsystem, dskip and dstart.

    Neither states are stored nor run again. With k = Re c - i Im c, the adjoint of the state is k q, where
    q_t = conj(a) q_{t+1} + dy_t; then du_t = Re(k q_t), dk = sum u_t conj(q_t), and da = k sum u_t r_t with a second
    filter behind the first, r_t = conj(a) r_{t+1} + q_{t+1}. The first state counts as an input at position -1.
    ``dlast`` is added to q behind the last position: it must be zero unless k is 1 and dy is 0 (see the caller).
    dsystem (B, blocks, P, 4, LANES): gradients of Re a, Im a, Re c, -Im c; dskip (B, blocks, LANES).
    """
    batch, length, width = u.shape
    n_pairs = system.shape[1]
    resets = reset.shape[1] > 0
    pair = np.zeros((n_pairs, 12 * LANES), u.dtype)
    tile = np.zeros(12 * LANES, u.dtype)
    for n in range(begin, end):
        offset = n * LANES
        lanes = min(LANES, width - offset)
        for p in range(n_pairs):
            _load(system[n, p], pair[p, 8 * LANES :])
        for b in range(batch):
            for p in range(n_pairs):
                pair[p, : 8 * LANES] = 0
                _load(dlast[b, n, p], pair[p, : 2 * LANES])
            dskip[b, n] = 0
            stop = length
            while stop > 0:
                size = _run_length_back(reset[b], stop) if resets else min(4, stop)
                t = stop - size
                for s in range(size):
                    _feed_back(
                        u[b, t + s, offset : offset + lanes],
                        dy[b, t + s, offset : offset + lanes],
                        skip[n],
                        dskip[b, n],
                        tile[3 * s * LANES : 3 * (s + 1) * LANES],
                    )
                if size == 4:
                    for p in range(n_pairs):
                        _four_back(pair[p], tile)
                else:
                    for s in range(size - 1, -1, -1):
                        for p in range(n_pairs):
                            _one_back(pair[p], tile[3 * s * LANES : 3 * (s + 1) * LANES])
                for s in range(size):
                    _store(tile[(3 * s + 2) * LANES : 3 * (s + 1) * LANES], du[b, t + s, offset : offset + lanes])
                if resets and reset[b, t]:
                    pair[:, : 4 * LANES] = 0
                stop = t
            for p in range(n_pairs):
                _close(pair[p], start[b, n, p], dsystem[b, n, p], dstart[b, n, p])


@kernel
def _run_length(reset: Array, t: int, length: int) -> int:
    """Positions from t, at most 4, before the next reset after t."""
    size = 1
    while size < 4 and t + size < length and not reset[t + size]:
        size += 1
    return size


@kernel
def _run_length_back(reset: Array, stop: int) -> int:
    """Positions before ``stop``, at most 4, of which only the first may be a reset."""
    size = 1
    while size < 4 and size < stop and not reset[stop - size]:
        size += 1
    return size


@kernel
def _load(source: Array, target: Array) -> None:
    for k in range(source.shape[0]):
        row = target[k * LANES : (k + 1) * LANES]
        for i in range(LANES):
            row[i] = source[k, i]


@kernel
def _store(source: Array, target: Array) -> None:
    for i in range(target.shape[0]):
        target[i] = source[i]


@kernel
def _feed(u: Array, skip: Array, tile: Array) -> None:
    """Input and the output's first part; lanes beyond the width keep an input of zero."""
    for i in range(u.shape[0]):
        tile[i] = u[i]
    for i in range(LANES):
        tile[LANES + i] = skip[i] * tile[i]


@kernel
def _feed_back(u: Array, dy: Array, skip: Array, dskip: Array, tile: Array) -> None:
    for i in range(u.shape[0]):
        tile[i] = u[i]
        tile[LANES + i] = dy[i]
    for i in range(LANES):
        tile[2 * LANES + i] = skip[i] * tile[LANES + i]
        dskip[i] += tile[i] * tile[LANES + i]


@kernel
def _one(pair: Array, tile: Array) -> None:
    for i in range(LANES):
        hr, hi = pair[i], pair[LANES + i]
        ar, ai, cr, ci = pair[2 * LANES + i], pair[3 * LANES + i], pair[4 * LANES + i], pair[5 * LANES + i]
        nr = ar * hr - ai * hi + tile[i]
        ni = ar * hi + ai * hr
        tile[LANES + i] += cr * nr + ci * ni
        pair[i], pair[LANES + i] = nr, ni


@kernel
def _four(pair: Array, tile: Array) -> None:
    for i in range(LANES):
        hr, hi = pair[i], pair[LANES + i]
        ar, ai, cr, ci = pair[2 * LANES + i], pair[3 * LANES + i], pair[4 * LANES + i], pair[5 * LANES + i]
        nr = ar * hr - ai * hi + tile[i]
        ni = ar * hi + ai * hr
        tile[LANES + i] += cr * nr + ci * ni
        hr = ar * nr - ai * ni + tile[2 * LANES + i]
        hi = ar * ni + ai * nr
        tile[3 * LANES + i] += cr * hr + ci * hi
        nr = ar * hr - ai * hi + tile[4 * LANES + i]
        ni = ar * hi + ai * hr
        tile[5 * LANES + i] += cr * nr + ci * ni
        hr = ar * nr - ai * ni + tile[6 * LANES + i]
        hi = ar * ni + ai * nr
        tile[7 * LANES + i] += cr * hr + ci * hi
        pair[i], pair[LANES + i] = hr, hi


@kernel
def _one_back(pair: Array, tile: Array) -> None:
    """One position of the adjoint. A row of ``pair``: conj(a) q_{t+1}, r_t, sums of u q and u r, a and k."""
    for i in range(LANES):
        ar, ai, cr, ci = pair[8 * LANES + i], pair[9 * LANES + i], pair[10 * LANES + i], pair[11 * LANES + i]
        rr, ri = pair[2 * LANES + i], pair[3 * LANES + i]
        qr, qi, v = pair[i] + tile[LANES + i], pair[LANES + i], tile[i]
        tile[2 * LANES + i] += cr * qr - ci * qi
        pair[4 * LANES + i] += v * qr
        pair[5 * LANES + i] += v * qi
        pair[6 * LANES + i] += v * rr
        pair[7 * LANES + i] += v * ri
        pair[2 * LANES + i] = ar * rr + ai * ri + qr
        pair[3 * LANES + i] = ar * ri - ai * rr + qi
        pair[i] = ar * qr + ai * qi
        pair[LANES + i] = ar * qi - ai * qr


@kernel
def _four_back(pair: Array, tile: Array) -> None:
    """Four positions of ``_one_back``, the last one first."""
    for i in range(LANES):
        ar, ai, cr, ci = pair[8 * LANES + i], pair[9 * LANES + i], pair[10 * LANES + i], pair[11 * LANES + i]
        rr, ri = pair[2 * LANES + i], pair[3 * LANES + i]
        qr, qi, v = pair[i] + tile[10 * LANES + i], pair[LANES + i], tile[9 * LANES + i]
        tile[11 * LANES + i] += cr * qr - ci * qi
        uq_r, uq_i, ur_r, ur_i = v * qr, v * qi, v * rr, v * ri
        sr, si = ar * rr + ai * ri + qr, ar * ri - ai * rr + qi
        pr, pi, v = ar * qr + ai * qi + tile[7 * LANES + i], ar * qi - ai * qr, tile[6 * LANES + i]
        tile[8 * LANES + i] += cr * pr - ci * pi
        uq_r, uq_i, ur_r, ur_i = uq_r + v * pr, uq_i + v * pi, ur_r + v * sr, ur_i + v * si
        rr, ri = ar * sr + ai * si + pr, ar * si - ai * sr + pi
        qr, qi, v = ar * pr + ai * pi + tile[4 * LANES + i], ar * pi - ai * pr, tile[3 * LANES + i]
        tile[5 * LANES + i] += cr * qr - ci * qi
        uq_r, uq_i, ur_r, ur_i = uq_r + v * qr, uq_i + v * qi, ur_r + v * rr, ur_i + v * ri
        sr, si = ar * rr + ai * ri + qr, ar * ri - ai * rr + qi
        pr, pi, v = ar * qr + ai * qi + tile[LANES + i], ar * qi - ai * qr, tile[i]
        tile[2 * LANES + i] += cr * pr - ci * pi
        pair[4 * LANES + i] += uq_r + v * pr
        pair[5 * LANES + i] += uq_i + v * pi
        pair[6 * LANES + i] += ur_r + v * sr
        pair[7 * LANES + i] += ur_i + v * si
        pair[2 * LANES + i] = ar * sr + ai * si + pr
        pair[3 * LANES + i] = ar * si - ai * sr + pi
        pair[i] = ar * pr + ai * pi
        pair[LANES + i] = ar * pi - ai * pr


@kernel
def _close(pair: Array, start: Array, dsystem: Array, dstart: Array) -> None:
    """Position -1, whose input is the first state; then the gradients of a and k, and of the first state."""
    for i in range(LANES):
        qr, qi, rr, ri = pair[i], pair[LANES + i], pair[2 * LANES + i], pair[3 * LANES + i]
        cr, ci = pair[10 * LANES + i], pair[11 * LANES + i]
        hr, hi = start[0, i], start[1, i]
        sum_r = pair[6 * LANES + i] + hr * rr + hi * ri
        sum_i = pair[7 * LANES + i] + hr * ri - hi * rr
        dsystem[0, i] = cr * sum_r - ci * sum_i
        dsystem[1, i] = cr * sum_i + ci * sum_r
        dsystem[2, i] = pair[4 * LANES + i] + hr * qr + hi * qi
        dsystem[3, i] = hi * qr - hr * qi - pair[5 * LANES + i]
        dstart[0, i] = cr * qr - ci * qi
        dstart[1, i] = cr * qi + ci * qr
