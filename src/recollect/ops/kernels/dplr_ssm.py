"""Compiled S4: diagonal plus rank one per channel, position after position; forward, and backward from checkpoints.

Layouts as in ``siso_ssm.py``, with 16 lanes, so that all of a block's pairs stay in the nearest cache. The rank one
couples the pairs of a channel through one number, s_t = v . h_{t-1}, which is summed for the next position while the
pairs are visited for this one. Backward runs ``STRETCH`` positions again at a time, from the states that forward kept.

system (blocks, P, 10, LANES): e, w, b as real and imaginary parts; then c and v as they multiply real and imaginary
parts of h: (2 Re, -2 Im).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import Tensor

from recollect.ops.kernels.compiled import Array, arrays, kernel, over_rows

LANES: Final = 16
STRETCH: Final = 32


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
    kept: Array,
) -> None:
    """y (B, L, D) and ``last`` for blocks ``begin..end``: h_t = e h_{t-1} - w s_t + b u_t, y_t = c . h_t + skip u_t.

    reset (B, L), or (B, 0) for none; skip (blocks, LANES); start and last (B, blocks, P, 2, LANES);
    kept (B, blocks, K, P, 2 LANES), the state before every stretch, or K = 0 to keep none.
    """
    batch, length, width = u.shape
    n_pairs = system.shape[1]
    resets = reset.shape[1] > 0
    pair = np.zeros((n_pairs, 12 * LANES), u.dtype)
    tile = np.zeros(4 * LANES, u.dtype)
    for n in range(begin, end):
        offset = n * LANES
        lanes = min(LANES, width - offset)
        tile[:] = 0
        for p in range(n_pairs):
            _load(system[n, p], pair[p, 2 * LANES :])
        for b in range(batch):
            tile[3 * LANES :] = 0
            for p in range(n_pairs):
                _load(start[b, n, p], pair[p, : 2 * LANES])
                _read(pair[p], tile)
            for t in range(length):
                if kept.shape[2] > 0 and t % STRETCH == 0:
                    for p in range(n_pairs):
                        _store(pair[p, : 2 * LANES], kept[b, n, t // STRETCH, p])
                if resets and reset[b, t]:
                    pair[:, : 2 * LANES] = 0
                    tile[3 * LANES :] = 0
                _feed(u[b, t, offset : offset + lanes], skip[n], tile)
                for p in range(n_pairs):
                    _one(pair[p], tile)
                _store(tile[LANES : 2 * LANES], y[b, t, offset : offset + lanes])
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
    kept: Array,
    dlast: Array,
    du: Array,
    dsystem: Array,
    dskip: Array,
    dstart: Array,
) -> None:
    """The adjoint for blocks ``begin..end``: du (B, L, D), and per row dsystem, dskip (B, blocks, LANES) and dstart.

    g_t = conj(e) g_{t+1} + v ds_{t+1} + c dy_t with ds_t = -w . g_t: as in forward, the sum over the pairs is used one
    visit later.
    """
    batch, length, width = u.shape
    n_pairs = system.shape[1]
    resets = reset.shape[1] > 0
    pair = np.zeros((n_pairs, 12 * LANES), u.dtype)
    tile = np.zeros(4 * LANES, u.dtype)
    # Of every position of a stretch: u, dy, s and ds; the state behind it; its adjoint.
    line = np.zeros((STRETCH + 1, 4 * LANES), u.dtype)
    h = np.zeros((STRETCH + 2, n_pairs, 2 * LANES), u.dtype)
    g = np.zeros((STRETCH + 1, n_pairs, 2 * LANES), u.dtype)
    empty = np.zeros((n_pairs, 2 * LANES), u.dtype)
    total = np.zeros((n_pairs, 10 * LANES), u.dtype)
    for n in range(begin, end):
        offset = n * LANES
        lanes = min(LANES, width - offset)
        line[:] = 0
        for p in range(n_pairs):
            _load(system[n, p], pair[p, 2 * LANES :])
        for b in range(batch):
            carry = np.zeros((n_pairs, 2 * LANES), u.dtype)
            ds = np.zeros(LANES, u.dtype)
            total[:] = 0
            dskip[b, n] = 0
            for p in range(n_pairs):
                _load(dlast[b, n, p], carry[p])
            for stretch in range((length - 1) // STRETCH, -1, -1):
                first = stretch * STRETCH
                size = min(STRETCH, length - first)
                tile[:] = 0
                for p in range(n_pairs):
                    _store(kept[b, n, stretch, p], h[0, p])
                    _store(kept[b, n, stretch, p], pair[p, : 2 * LANES])
                    _read(pair[p], tile)
                for k in range(size):
                    if resets and reset[b, first + k]:
                        pair[:, : 2 * LANES] = 0
                        tile[3 * LANES :] = 0
                    _feed(u[b, first + k, offset : offset + lanes], skip[n], tile)
                    _store(tile[:LANES], line[k, :LANES])
                    _store(dy[b, first + k, offset : offset + lanes], line[k, LANES : 2 * LANES])
                    _store(tile[2 * LANES : 3 * LANES], line[k, 2 * LANES : 3 * LANES])
                    for p in range(n_pairs):
                        _one(pair[p], tile)
                        _store(pair[p, : 2 * LANES], h[k + 1, p])
                for p in range(n_pairs):
                    _store(carry[p], pair[p, : 2 * LANES])
                for k in range(size - 1, -1, -1):
                    _feed_back(line[k], skip[n], ds, dskip[b, n], tile)
                    for p in range(n_pairs):
                        _one_back(pair[p], tile, g[k, p])
                    _turn(tile, ds, line[k])
                    _store(tile[LANES : LANES + lanes], du[b, first + k, offset : offset + lanes])
                    if resets and reset[b, first + k]:
                        pair[:, : 2 * LANES] = 0
                        ds[:] = 0
                for p in range(n_pairs):
                    _store(pair[p, : 2 * LANES], carry[p])
                if size % 2:
                    line[size] = 0
                    g[size] = 0
                for k in range(0, size, 2):
                    cut = resets and reset[b, first + k]
                    cut_next = resets and k + 1 < size and reset[b, first + k + 1]
                    for p in range(n_pairs):
                        before = empty[p] if cut else h[k, p]
                        between = empty[p] if cut_next else h[k + 1, p]
                        _gather(before, h[k + 1, p], g[k, p], line[k], total[p])
                        _gather(between, h[k + 2, p], g[k + 1, p], line[k + 1], total[p])
            for p in range(n_pairs):
                for k in range(10):
                    _store(total[p, k * LANES : (k + 1) * LANES], dsystem[b, n, p, k])
                _end(carry[p], pair[p], ds, dstart[b, n, p])


@kernel
def _load(source: Array, target: Array) -> None:
    for k in range(source.shape[0]):
        row = target[k * LANES : (k + 1) * LANES]
        for i in range(LANES):
            row[i] = source[k, i]


@kernel
def _store(source: Array, target: Array) -> None:
    for i in range(min(source.shape[0], target.shape[0])):
        target[i] = source[i]


@kernel
def _read(pair: Array, tile: Array) -> None:
    """Add v . h to the sum for the next position."""
    for i in range(LANES):
        tile[3 * LANES + i] += pair[10 * LANES + i] * pair[i] + pair[11 * LANES + i] * pair[LANES + i]


@kernel
def _feed(u: Array, skip: Array, tile: Array) -> None:
    """A tile is u, y, s for this position, and s for the next, as it is summed."""
    for i in range(u.shape[0]):
        tile[i] = u[i]
    for i in range(LANES):
        tile[LANES + i] = skip[i] * tile[i]
        tile[2 * LANES + i] = tile[3 * LANES + i]
        tile[3 * LANES + i] = 0


@kernel
def _one(pair: Array, tile: Array) -> None:
    for i in range(LANES):
        hr, hi, er, ei = pair[i], pair[LANES + i], pair[2 * LANES + i], pair[3 * LANES + i]
        v, s = tile[i], tile[2 * LANES + i]
        nr = er * hr - ei * hi + (pair[6 * LANES + i] * v - pair[4 * LANES + i] * s)
        ni = er * hi + ei * hr + (pair[7 * LANES + i] * v - pair[5 * LANES + i] * s)
        tile[LANES + i] += pair[8 * LANES + i] * nr + pair[9 * LANES + i] * ni
        tile[3 * LANES + i] += pair[10 * LANES + i] * nr + pair[11 * LANES + i] * ni
        pair[i], pair[LANES + i] = nr, ni


@kernel
def _feed_back(line: Array, skip: Array, ds: Array, dskip: Array, tile: Array) -> None:
    """Backward a tile is dy, du, ds of the position behind, and ds of this one, as it is summed."""
    for i in range(LANES):
        dy = line[LANES + i]
        dskip[i] += line[i] * dy
        tile[i] = dy
        tile[LANES + i] = skip[i] * dy
        tile[2 * LANES + i] = ds[i]
        tile[3 * LANES + i] = 0


@kernel
def _one_back(pair: Array, tile: Array, g: Array) -> None:
    """In ``pair`` conj(e) g_{t+1} takes the place of the state."""
    for i in range(LANES):
        er, ei, v, ds = pair[2 * LANES + i], pair[3 * LANES + i], tile[i], tile[2 * LANES + i]
        gr = pair[i] + (pair[8 * LANES + i] * v + pair[10 * LANES + i] * ds)
        gi = pair[LANES + i] + (pair[9 * LANES + i] * v + pair[11 * LANES + i] * ds)
        tile[LANES + i] += pair[6 * LANES + i] * gr + pair[7 * LANES + i] * gi
        tile[3 * LANES + i] -= pair[4 * LANES + i] * gr + pair[5 * LANES + i] * gi
        pair[i], pair[LANES + i] = er * gr + ei * gi, er * gi - ei * gr
        g[i], g[LANES + i] = gr, gi


@kernel
def _turn(tile: Array, ds: Array, line: Array) -> None:
    for i in range(LANES):
        ds[i] = tile[3 * LANES + i]
    for i in range(LANES):
        line[3 * LANES + i] = tile[3 * LANES + i]


@kernel
def _gather(before: Array, h: Array, g: Array, line: Array, total: Array) -> None:
    """Gradients of e, w, b, c and v from one position."""
    for i in range(LANES):
        gr, gi, br, bi = g[i], g[LANES + i], before[i], before[LANES + i]
        v, dy, s, ds = line[i], line[LANES + i], line[2 * LANES + i], line[3 * LANES + i]
        total[i] += gr * br + gi * bi
        total[LANES + i] += gi * br - gr * bi
        total[2 * LANES + i] -= s * gr
        total[3 * LANES + i] -= s * gi
        total[4 * LANES + i] += v * gr
        total[5 * LANES + i] += v * gi
        total[6 * LANES + i] += dy * h[i]
        total[7 * LANES + i] += dy * h[LANES + i]
        total[8 * LANES + i] += ds * br
        total[9 * LANES + i] += ds * bi


@kernel
def _end(carry: Array, pair: Array, ds: Array, dstart: Array) -> None:
    for i in range(LANES):
        dstart[0, i] = carry[i] + pair[10 * LANES + i] * ds[i]
        dstart[1, i] = carry[LANES + i] + pair[11 * LANES + i] * ds[i]
