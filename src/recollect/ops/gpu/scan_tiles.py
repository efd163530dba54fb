"""Tiles of (time, channels) of a diagonal recurrence, as the kernels of ``gpu.scan`` share them.

Complex numbers are two real arrays; of real ones the second is never used. ``step`` and ``apart`` are how far positions
and the parts of a number lie apart in memory, ``STEP`` neighbouring channels. Positions outside of a row are read from
the nearest inside: what they give is masked where it counts, and rows are read without masks.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def combine_complex(a1, a1i, b1, b1i, a2, a2i, b2, b2i):
    return a1 * a2 - a1i * a2i, a1 * a2i + a1i * a2, a2 * b1 - a2i * b1i + b2, a2 * b1i + a2i * b1 + b2i


@triton.jit
def scan_tile(a, ai, b, bi, COMPLEX: tl.constexpr):
    """Products of a and states from zero, from the first place of a tile on."""
    if COMPLEX:
        a, ai, b, bi = tl.associative_scan((a, ai, b, bi), 0, combine_complex)
    else:
        a, b = tl.associative_scan((a, b), 0, combine)
    return a, ai, b, bi


@triton.jit
def times(a, ai, b, bi, COMPLEX: tl.constexpr):
    if COMPLEX:
        c, ci = a * b - ai * bi, a * bi + ai * b
    else:
        c, ci = a * b, a * b
    return c, ci


@triton.jit
def times_conj(a, ai, b, bi, COMPLEX: tl.constexpr):
    """conj(a) b."""
    if COMPLEX:
        c, ci = a * b + ai * bi, a * bi - ai * b
    else:
        c, ci = a * b, a * b
    return c, ci


@triton.jit
def load_vector(at, channel, channels, COMPLEX: tl.constexpr):
    """A block of channels of planes: the real and the imaginary parts."""
    x = tl.load(at + channel, mask=channel < channels, other=0)
    xi = x
    if COMPLEX:
        xi = tl.load(at + channels + channel, mask=channel < channels, other=0)
    return x, xi


@triton.jit
def store_vector(at, x, xi, channel, channels, COMPLEX: tl.constexpr):
    tl.store(at + channel, x, mask=channel < channels)
    if COMPLEX:
        tl.store(at + channels + channel, xi, mask=channel < channels)


@triton.jit
def offsets(time, channel, length, channels, step, STEP: tl.constexpr):
    """Where the numbers of a tile are in their row; the nearest ones for those outside."""
    time = tl.minimum(tl.maximum(time, 0), length - 1).to(tl.int64)
    return time[:, None] * step + tl.minimum(channel, channels - 1)[None, :] * STEP


@triton.jit
def load_tile(at, time, channel, length, channels, step, apart, COMPLEX: tl.constexpr, STEP: tl.constexpr):
    """The numbers of a block of channels at some positions, (TILE, CHANNELS) twice."""
    at += offsets(time, channel, length, channels, step, STEP)
    x = tl.load(at).to(tl.float32)
    xi = x
    if COMPLEX:
        xi = tl.load(at + apart).to(tl.float32)
    return x, xi


@triton.jit
def store_tile(at, x, xi, time, low, high, channel, channels, step, apart, COMPLEX: tl.constexpr, STEP: tl.constexpr):
    """Write the positions in [low, high)."""
    there = ((time >= low) & (time < high))[:, None] & (channel < channels)[None, :]
    at += time[:, None].to(tl.int64) * step + channel[None, :] * STEP
    tl.store(at, x, mask=there)
    if COMPLEX:
        tl.store(at + apart, xi, mask=there)


@triton.jit
def load_decay(
    a,
    time,
    channel,
    length,
    channels,
    step,
    apart,
    c,
    ci,
    VARYING: tl.constexpr,
    COMPLEX: tl.constexpr,
    STEP: tl.constexpr,
):
    """a at some positions; ``c`` where it is constant."""
    if VARYING:
        d, di = load_tile(a, time, channel, length, channels, step, apart, COMPLEX, STEP)
    else:
        shape: tl.constexpr = (time.shape[0], channel.shape[0])
        d, di = tl.broadcast_to(c[None, :], shape), tl.broadcast_to(ci[None, :], shape)
    return d, di


@triton.jit
def load_cuts(reset, time, length):
    """Which positions a reset acts before, (TILE, 1)."""
    return tl.load(reset + tl.minimum(tl.maximum(time, 0), length - 1))[:, None] != 0


@triton.jit
def pick(x, xi, nth, which, COMPLEX: tl.constexpr):
    """One place of a tile."""
    row = tl.sum(tl.where(nth[:, None] == which, x, 0.0), 0)
    row_i = row
    if COMPLEX:
        row_i = tl.sum(tl.where(nth[:, None] == which, xi, 0.0), 0)
    return row, row_i


@triton.jit
def add_carry(x, xi, d, di, s, si, nth, COMPLEX: tl.constexpr):
    """The tile's elements with the state before it in the first."""
    w, wi = times(d, di, s[None, :], si[None, :], COMPLEX)
    return tl.where(nth[:, None] == 0, x + w, x), tl.where(nth[:, None] == 0, xi + wi, xi)


@triton.jit
def elements(
    a,
    b,
    reset,
    time,
    channel,
    length,
    channels,
    step,
    apart,
    c,
    ci,
    f,
    fi,
    VARYING: tl.constexpr,
    RESET: tl.constexpr,
    COMPLEX: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the scan's elements; c is a constant a, f the state after a reset."""
    x, xi = load_tile(b, time, channel, length, channels, step, apart, COMPLEX, STEP)
    d, di = load_decay(a, time, channel, length, channels, step, apart, c, ci, VARYING, COMPLEX, STEP)
    if RESET:
        cut = load_cuts(reset, time, length)
        w, wi = times(d, di, f[None, :], fi[None, :], COMPLEX)
        x, xi = tl.where(cut, x + w, x), tl.where(cut, xi + wi, xi)
        d, di = tl.where(cut, 0.0, d), tl.where(cut, 0.0, di)
    return d, di, x, xi


@triton.jit
def adjoint_elements(
    a,
    g,
    reset,
    time,
    channel,
    length,
    channels,
    step,
    apart,
    c,
    ci,
    VARYING: tl.constexpr,
    RESET: tl.constexpr,
    COMPLEX: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the adjoint's: conj(a_{t+1}), 1 at the last position, and the gradients of the states."""
    x, xi = load_tile(g, time, channel, length, channels, step, apart, COMPLEX, STEP)
    d, di = load_decay(a, time + 1, channel, length, channels, step, apart, c, ci, VARYING, COMPLEX, STEP)
    if RESET:
        cut = load_cuts(reset, time + 1, length)
        d, di = tl.where(cut, 0.0, d), tl.where(cut, 0.0, di)
    beyond = (time + 1 >= length)[:, None]
    return tl.where(beyond, 1.0, d), tl.where(beyond, 0.0, -di), x, xi
