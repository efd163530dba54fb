"""Tiles of (states, channels) of diagonal state-space models, as the kernels of ``gpu.siso`` share them.

Complex numbers are two real arrays, in memory side by side: (D, P, 2). ``rows`` are tuples of one row of channels per
position, which the kernels unroll.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(states, channels, blocks, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Row and channels of a program, and where its pairs are in (D, P, 2)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, STATES)
    live = (state < states)[:, None] & (channel < channels)[None, :]
    return row, channel, (channel[None, :] * states + state[:, None]) * 2, live


@triton.jit
def load_pair(at, live):
    return tl.load(at, mask=live, other=0), tl.load(at + 1, mask=live, other=0)


@triton.jit
def store_pair(at, x, xi, live):
    tl.store(at, x, mask=live)
    tl.store(at + 1, xi, mask=live)


@triton.jit
def load_rows(at, count, step, TILE: tl.constexpr):
    """The first TILE rows of ``count`` that lie ``step`` apart; zero for those there are not."""
    rows = ()
    for j in tl.static_range(TILE):
        rows = rows + (tl.load(at + j * step, mask=tl.full(at.shape, j, tl.int32) < count, other=0),)  # noqa: RUF005
    return rows


@triton.jit
def load_cuts(reset, time, low, high, RESET: tl.constexpr):
    """The resets of some positions, those outside of [low, high) left out."""
    cuts = time
    if RESET:
        cuts = tl.load(reset + time, mask=(time >= low) & (time < high), other=0).to(tl.int32)
    return cuts


@triton.jit
def move(a, ai, h, hi, x):
    """a h + x."""
    return a * h + (x - ai * hi), a * hi + ai * h


@triton.jit
def move_back(a, ai, h, hi, x, xi):
    """conj(a) h + x."""
    return a * h + (ai * hi + x), a * hi + (xi - ai * h)


@triton.jit
def carried(
    given,
    power,
    ends,
    kept,
    row,
    at,
    live,
    channels,
    states,
    RESET: tl.constexpr,
    SPANS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state that a span starts from: ``given`` for the first, else what the spans before it left behind."""
    size = channels * states * 2
    s, si = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32)
    if SPANS:
        spans = tl.num_programs(1)
        before = tl.program_id(1)
        if REVERSE:
            before = spans - 1 - tl.program_id(1)
        if before == 0:
            s, si = load_pair(given + row * size + at, live)
        p, pi = load_pair(power + at, live)
        if REVERSE:
            pi = -pi
        for k in range(0, before):
            j = row * spans + k
            if REVERSE:
                j = row * spans + spans - 1 - k
            if RESET:
                keep = tl.load(kept + j) != 0
                s, si = tl.where(keep, s, 0.0), tl.where(keep, si, 0.0)
            e, ei = load_pair(ends + j * size + at, live)
            s, si = p * s + (e - pi * si), p * si + (ei + pi * s)
    else:
        s, si = load_pair(given + row * size + at, live)
    return s, si


@triton.jit
def summary_tile(
    rows, reset, a, ai, s, si, INPUT: tl.constexpr, CUTS: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr
):
    for j in tl.static_range(TILE):
        if REVERSE:
            if INPUT:
                s += rows[j].to(tl.float32)[None, :]
            s, si = a * s + ai * si, a * si - ai * s
            if CUTS:
                cut = tl.load(reset) != 0
                s, si = tl.where(cut, 0.0, s), tl.where(cut, 0.0, si)
        else:
            if CUTS:
                cut = tl.load(reset) != 0
                s, si = tl.where(cut, 0.0, s), tl.where(cut, 0.0, si)
            s, si = move(a, ai, s, si, rows[j].to(tl.float32)[None, :])
    return s, si


@triton.jit
def forward_tile(rows, y, reset, there, step, a, ai, c, ci, skip, h, hi, CUTS: tl.constexpr, TILE: tl.constexpr):
    for j in tl.static_range(TILE):
        v = rows[j].to(tl.float32)
        if CUTS:
            cut = tl.load(reset) != 0
            h, hi = tl.where(cut, 0.0, h), tl.where(cut, 0.0, hi)
        h, hi = move(a, ai, h, hi, v[None, :])
        tl.store(y + j * step, skip * v + tl.sum(c * h - ci * hi, 0), mask=there)
    return h, hi


@triton.jit
def backward_tile(
    us, dys, du, reset, there, step, system, sums, INPUT: tl.constexpr, CUTS: tl.constexpr, TILE: tl.constexpr
):
    """Positions in falling order; ``dys`` holds the one after them too."""
    a, ai, c, ci, skip = system
    q, qi, r, ri, uq, uqi, ur, uri, ds = sums
    for j in tl.static_range(TILE):
        v = us[j].to(tl.float32)
        ur, uri = ur + v[None, :] * r, uri + v[None, :] * ri
        if INPUT:
            g = dys[j].to(tl.float32)
            after = dys[j + 1].to(tl.float32)[None, :]
            ds += v * g
            uq, uqi = uq + v[None, :] * q, uqi + v[None, :] * qi
            tl.store(du + j * step, skip * g + tl.sum(c * q + ci * qi, 0), mask=there)
        else:
            after = 0.0
            tl.store(du + j * step, tl.sum(q, 0), mask=there)
        r, ri = move_back(a, ai, r, ri, q, qi)
        q, qi = move_back(a, ai, q, qi, after, 0.0)
        if CUTS:
            cut = tl.load(reset) != 0
            r, ri = tl.where(cut, 0.0, r), tl.where(cut, 0.0, ri)
            q, qi = tl.where(cut, after, q), tl.where(cut, 0.0, qi)
    return q, qi, r, ri, uq, uqi, ur, uri, ds
