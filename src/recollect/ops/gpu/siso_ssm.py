"""h_t = a h_{t-1} + u_t, y_t = Re(c . h_t) + skip u_t per channel, all states of some channels in a warp's registers.

A program is one warp and goes through its span of time position by position with a tile of (states, channels), 8 states
in each thread; inputs are read while a tile of positions before them is worked on. The sum over states is taken in a
thread, then over the 1 to 32 threads that share a channel. Nothing of size L x P goes to memory. As in ``gpu.scan``
strides are not specialised: Triton would have threads hold neighbours in memory, and shuffle them. A tile of positions
that holds a reset, or is cut short, is taken one by one. Sums are float32 whatever the inputs, and nothing is atomic.

Backward keeps u. The adjoint of the states is conj(c) q_t with q_t = conj(a) q_{t+1} + dy_t, so dc = sum u_t q_t, and
da = conj(c) sum u_t r_t with a second filter, r_{t-1} = conj(a) r_t + q_t: 14 multiply-adds a state (8 for the filters,
2 for du, 4 for the sums). To run h_t again from saved states instead would take 16, and its tiles of h_t, needed in
falling order, fit no registers: with 32 states, one saved every 16 positions is 32 bytes a position where u, dy and du
are 12, and what lies between goes through shared memory, four accesses a state.

Floor, for a position of a channel with P states: forward moves 8 bytes and takes 6 P multiply-adds, backward 12 bytes
and 14 P. An H100 does 10 multiply-adds in the time of a byte: operations bind from P = 14, and P = 32 needs 2.4 times
as long as its bytes forward, 3.7 times backward. Compiled, 8 channels of 32 states are 75 instructions forward, 48 of
them counted here, and 160 backward, 112 counted. Gradients of a, c and skip are summed per row and span, then by
``torch.sum``. Where rows and channels give too few programs to keep a GPU busy, time is cut into spans: a first launch
makes of every span what it leaves behind, from zero, and the main launch starts every span with those before it.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recollect.ops.gpu.siso_tiles import (
    backward_tile,
    carried,
    forward_tile,
    load_cuts,
    load_pair,
    load_rows,
    move_back,
    place,
    store_pair,
    summary_tile,
)

HELD = 8
"""States of a thread, 6 numbers for each forward and 12 backward; more where a channel has more than 256, and then some
are spilled."""
TILE, TILE_BACK = 8, 4
"""Positions whose inputs are read while as many before them are worked on, forward and backward."""
REGISTERS, REGISTERS_BACK = 144, 232
"""What a thread may have, forward and backward: not told, the assembler spills some to make room for warps that are not
there.
"""
SCHEDULERS = 528
"""Programs, of one warp, that keep every scheduler busy: four for each of the 132 multiprocessors of an H100. A
constant: sums must not depend on a device."""


class _Plan(NamedTuple):
    rows: int
    length: int
    channels: int
    states: int
    padded: int  # states of a tile, a power of two
    block: int  # channels of a program
    blocks: int
    spans: int
    span: int  # positions, whole tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.length, self.channels, self.states, self.blocks, self.span

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows * self.blocks, self.spans


def cut_time(u: Tensor, states: int) -> _Plan:
    """Blocks of channels, and spans."""
    rows, length, channels = u.shape
    padded = triton.next_power_of_2(states)
    block = min(32, max(1, 32 * HELD // padded))
    blocks = triton.cdiv(channels, block)
    programs = rows * blocks
    # Spans take a second pass, of 4 operations for 6: not to fill what is two thirds full. The program of a span goes
    # through the ends of all before it, each in the time of a few positions: they are four times as long as many.
    most = max(1, math.isqrt(length) // 2)
    spans = 1 if 3 * programs > 2 * SCHEDULERS else min(triton.cdiv(2 * SCHEDULERS, programs), most)
    span = triton.cdiv(triton.cdiv(length, spans), TILE) * TILE
    return _Plan(rows, length, channels, states, padded, block, blocks, triton.cdiv(length, span), span)


def forward(
    u: Tensor, a: Tensor, c: Tensor, skip: Tensor, h_init: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D) and the last state (B, D, P, 2), in float32, and what ``backward`` wants: the state before each span.

    u (B, L, D); a, c (D, P, 2) and h_init (B, D, P, 2) real and imaginary parts, skip (D,), all float32; reset (B, L)
    bool.
    """
    plan = cut_time(u, a.shape[1])
    u, a, c, skip, h_init = (t.contiguous() for t in (u, a, c, skip, h_init))
    flags = u if reset is None else _flags(reset)
    y, last = torch.empty_like(u, dtype=torch.float32), torch.empty_like(h_init)
    options = (reset is not None, plan.padded, plan.block, TILE)
    across, starts = (a, h_init, flags), h_init
    if plan.spans > 1:
        across = _ends(u, a, h_init, reset, flags, plan, reverse=False)
        starts = h_init.new_empty(plan.rows, plan.spans, *a.shape)
    _forward[plan.grid](
        u,
        a,
        c,
        skip,
        h_init,
        flags,
        *across,
        y,
        starts,
        last,
        *plan.sizes,
        plan.spans > 1,
        *options,
        num_warps=1,
        maxnreg=REGISTERS,
    )
    return y, last, starts


def backward(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    skip: Tensor,
    starts: Tensor,
    reset: Tensor | None,
    dy: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, a, c, skip and h_init from those of y and of the last state, either of which may be absent.

    The adjoint of the states is conj(c) q_t + e_t, of which e comes from the last state: as if c were 1 and y unread.
    A launch for each.
    """
    if dy is None or dlast is None:
        return _adjoint(u, a, c, skip, starts, reset, dy, dlast, u.dtype)
    parts = (_adjoint(u, a, c, skip, starts, reset, *grads, torch.float32) for grads in ((dy, None), (None, dlast)))
    du, da, dc, dskip, dinit = (x + y for x, y in zip(*parts, strict=True))
    return du.to(u.dtype), da, dc, dskip, dinit


def _adjoint(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    skip: Tensor,
    starts: Tensor,
    reset: Tensor | None,
    dy: Tensor | None,
    dlast: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``backward`` for one of them, the gradient of u in ``dtype``."""
    plan = cut_time(u, a.shape[1])
    u, a, c, skip = (t.contiguous() for t in (u, a, c, skip))
    flags = u if reset is None else _flags(reset)
    x = u if dy is None else dy.contiguous()
    end = a.new_zeros(plan.rows, *a.shape) if dlast is None else dlast.contiguous()
    du, dinit = torch.empty_like(u, dtype=dtype), torch.empty_like(end)
    make = a.new_zeros if dy is None else a.new_empty
    dsystem, dskip = make(2, plan.rows, plan.spans, *a.shape), make(plan.rows, plan.spans, plan.channels)
    options = (reset is not None, dy is not None, plan.padded, plan.block, TILE_BACK)
    across = (a, end, flags)
    if plan.spans > 1:
        across = _ends(None if dy is None else x, a, end, reset, flags, plan, reverse=True)
    _backward[plan.grid](
        u,
        x,
        a,
        c,
        skip,
        end,
        starts,
        flags,
        *across,
        du,
        dsystem[0],
        dsystem[1],
        dskip,
        dinit,
        *plan.sizes,
        plan.spans > 1,
        *options,
        num_warps=1,
        maxnreg=REGISTERS_BACK,
    )
    da, dc = dsystem.sum((1, 2))
    return du, da, dc, dskip.sum((0, 1)), dinit


def _ends(
    x: Tensor | None, a: Tensor, given: Tensor, reset: Tensor | None, flags: Tensor, plan: _Plan, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """a^span; what every span makes of zero, the first of ``given``, (B, spans, D, P, 2); whether it has no reset."""
    ends = a.new_empty(plan.rows, plan.spans, *a.shape)
    kept = torch.empty(plan.rows, plan.spans, dtype=torch.int32, device=a.device)
    options = (reset is not None, x is not None, plan.padded, plan.block, TILE, reverse)
    _summary[plan.grid](a if x is None else x, a, given, flags, ends, kept, *plan.sizes, *options, num_warps=1)
    return powers(a, plan.span), ends, kept


def powers(a: Tensor, n: int) -> Tensor:
    """a^n of complex numbers as pairs, (..., 2)."""
    power, size = torch.empty_like(a), a.numel() // 2
    _power[triton.cdiv(size, 128),](a, power, size, n, 128, num_warps=4)
    return power


def _flags(reset: Tensor) -> Tensor:
    return reset.contiguous().view(torch.uint8)


@triton.jit(do_not_specialize=["n"])
def _power(a, power, size, n, BLOCK: tl.constexpr):
    """a^n, multiplied in float64 and rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(a + 2 * at, mask=at < size, other=0).to(tl.float64)
    bi = tl.load(a + 2 * at + 1, mask=at < size, other=0).to(tl.float64)
    p, pi = tl.full((BLOCK,), 1.0, tl.float64), tl.zeros((BLOCK,), tl.float64)
    while n > 0:
        if n % 2 == 1:
            p, pi = p * b - pi * bi, p * bi + pi * b
        b, bi = b * b - bi * bi, 2 * b * bi
        n = n // 2
    tl.store(power + 2 * at, p.to(tl.float32), mask=at < size)
    tl.store(power + 2 * at + 1, pi.to(tl.float32), mask=at < size)


@triton.jit(do_not_specialize=["channels", "states"])
def _summary(
    x,
    a,
    given,
    reset,
    ends,
    kept,
    length,
    channels,
    states,
    blocks,
    span,
    RESET: tl.constexpr,
    INPUT: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a span makes of zero, or the first of what is given: s = a s + x; in reverse, s = conj(a) (s + x)."""
    row, channel, at, live = place(states, channels, blocks, STATES, BLOCK)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    count = stop - begin
    r, ri = load_pair(a + at, live)
    first, way = begin, 1
    comes_first = tl.program_id(1) == 0
    if REVERSE:
        first, way = stop - 1, -1
        comes_first = tl.program_id(1) == tl.num_programs(1) - 1
    s, si = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32)
    if comes_first:
        s, si = load_pair(given + row * channels * states * 2 + at, live)
    x += row * length * channels + tl.minimum(channel, channels - 1)
    if RESET:
        reset += row * length
    step = way * channels
    nth = way * tl.arange(0, TILE)
    rows = ()
    if INPUT:
        rows = load_rows(x + first.to(tl.int64) * channels, count, step, TILE)
    cuts = load_cuts(reset, first + nth, begin, stop, RESET)
    any_cut = begin * 0
    for done in range(0, count, TILE):
        time = first + way * done
        ahead = rows
        if INPUT:
            ahead = load_rows(x + (time + way * TILE).to(tl.int64) * channels, count - done - TILE, step, TILE)
        slowly = done + TILE > count
        if RESET:
            cut = tl.max(cuts, 0)
            any_cut = tl.maximum(any_cut, cut)
            slowly = slowly | (cut != 0)
            cuts = load_cuts(reset, time + way * TILE + nth, begin, stop, RESET)
        if slowly:
            for more in range(done, tl.minimum(done + TILE, count)):
                at_time = first + way * more
                one = ()
                if INPUT:
                    one = load_rows(x + at_time.to(tl.int64) * channels, 1, step, 1)
                s, si = summary_tile(one, reset + at_time, r, ri, s, si, INPUT, RESET, 1, REVERSE)
        else:
            s, si = summary_tile(rows, reset, r, ri, s, si, INPUT, False, TILE, REVERSE)
        rows = ahead
    here = row * tl.num_programs(1) + tl.program_id(1)
    store_pair(ends + here * channels * states * 2 + at, s, si, live)
    if RESET:
        whole = (any_cut == 0).to(tl.int32)
        if tl.program_id(0) % blocks == 0:
            tl.store(kept + here, whole)


@triton.jit(do_not_specialize=["channels", "states"])
def _forward(
    u,
    a,
    c,
    skip,
    h_init,
    reset,
    power,
    ends,
    kept,
    y,
    starts,
    last,
    length,
    channels,
    states,
    blocks,
    span,
    SPANS: tl.constexpr,
    RESET: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """y and last state; with SPANS, the states that spans start from."""
    row, channel, at, live = place(states, channels, blocks, STATES, BLOCK)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    count = stop - begin
    h, hi = carried(h_init, power, ends, kept, row, at, live, channels, states, RESET, SPANS, False)
    if SPANS:
        here = row * tl.num_programs(1) + tl.program_id(1)
        store_pair(starts + here * channels * states * 2 + at, h, hi, live)
    r, ri = load_pair(a + at, live)
    k, ki = load_pair(c + at, live)
    there = channel < channels
    d = tl.load(skip + channel, mask=there, other=0)
    u += row * length * channels + tl.minimum(channel, channels - 1)
    y += row * length * channels + channel
    if RESET:
        reset += row * length
    nth = tl.arange(0, TILE)
    rows = load_rows(u + begin.to(tl.int64) * channels, count, channels, TILE)
    cuts = load_cuts(reset, begin + nth, begin, stop, RESET)
    for done in range(0, count, TILE):
        time = begin + done
        ahead = load_rows(u + (time + TILE).to(tl.int64) * channels, count - done - TILE, channels, TILE)
        slowly = done + TILE > count
        if RESET:
            slowly = slowly | (tl.max(cuts, 0) != 0)
            cuts = load_cuts(reset, time + TILE + nth, begin, stop, RESET)
        if slowly:
            for more in range(done, tl.minimum(done + TILE, count)):
                at_time = begin + more
                here = at_time.to(tl.int64) * channels
                one = load_rows(u + here, 1, channels, 1)
                h, hi = forward_tile(one, y + here, reset + at_time, there, channels, r, ri, k, ki, d, h, hi, RESET, 1)
        else:
            out = y + time.to(tl.int64) * channels
            h, hi = forward_tile(rows, out, reset, there, channels, r, ri, k, ki, d, h, hi, False, TILE)
        rows = ahead
    if stop == length:
        store_pair(last + row * channels * states * 2 + at, h, hi, live)


@triton.jit(do_not_specialize=["channels", "states"])
def _backward(
    u,
    dy,
    a,
    c,
    skip,
    end,
    starts,
    reset,
    power,
    ends,
    kept,
    du,
    da,
    dc,
    dskip,
    dinit,
    length,
    channels,
    states,
    blocks,
    span,
    SPANS: tl.constexpr,
    RESET: tl.constexpr,
    INPUT: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """du; da, dc (B, spans, D, P, 2) and dskip (B, spans, D) of a span; dinit. Without INPUT c is 1 and dy zero."""
    row, channel, at, live = place(states, channels, blocks, STATES, BLOCK)
    size = channels * states * 2
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    count = stop - begin
    q, qi = carried(end, power, ends, kept, row, at, live, channels, states, RESET, SPANS, True)
    b, bi = load_pair(a + at, live)
    k, ki = tl.full(at.shape, 1.0, tl.float32), tl.zeros(at.shape, tl.float32)
    there = channel < channels
    d = tl.zeros((BLOCK,), tl.float32)
    nearest = tl.minimum(channel, channels - 1)
    u += row * length * channels + nearest
    du += row * length * channels + channel
    if RESET:
        reset += row * length
    r, ri = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32)
    uq, uqi, ur, uri, ds = r, r, r, r, d
    nth = tl.arange(0, TILE)
    last = (stop - 1).to(tl.int64) * channels
    us = load_rows(u + last, count, -channels, TILE)
    dys = us
    if INPUT:
        k, ki = load_pair(c + at, live)
        d = tl.load(skip + channel, mask=there, other=0)
        dy += row * length * channels + nearest
        dys = load_rows(dy + last, count, -channels, TILE)
        q += dys[0].to(tl.float32)[None, :]
    cuts = load_cuts(reset, stop - 1 - nth, begin, stop, RESET)
    system = (b, bi, k, ki, d)
    for done in range(0, count, TILE):
        time = stop - 1 - done
        here = time.to(tl.int64) * channels
        us_ahead = load_rows(u + here - TILE * channels, count - done - TILE, -channels, TILE)
        dys_ahead = us_ahead
        if INPUT:
            dys_ahead = load_rows(dy + here - TILE * channels, count - done - TILE, -channels, TILE)
        slowly = done + TILE > count
        if RESET:
            slowly = slowly | (tl.max(cuts, 0) != 0)
            cuts = load_cuts(reset, time - TILE - nth, begin, stop, RESET)
        if slowly:
            for more in range(done, tl.minimum(done + TILE, count)):
                at_time = stop - 1 - more
                row_at = at_time.to(tl.int64) * channels
                one = load_rows(u + row_at, 1, -channels, 1)
                two = one
                if INPUT:
                    two = load_rows(dy + row_at, count - more, -channels, 2)
                sums = (q, qi, r, ri, uq, uqi, ur, uri, ds)
                q, qi, r, ri, uq, uqi, ur, uri, ds = backward_tile(
                    one, two, du + row_at, reset + at_time, there, -channels, system, sums, INPUT, RESET, 1
                )
        else:
            sums = (q, qi, r, ri, uq, uqi, ur, uri, ds)
            dys_all = dys + (dys_ahead[0],)  # noqa: RUF005
            q, qi, r, ri, uq, uqi, ur, uri, ds = backward_tile(
                us, dys_all, du + here, reset, there, -channels, system, sums, INPUT, False, TILE
            )
        us, dys = us_ahead, dys_ahead
    span_at = row * tl.num_programs(1) + tl.program_id(1)
    h, hi = load_pair(starts + span_at * size + at, live)
    # The state before a span is an input one position earlier; ``uq`` counts that of the first span alone.
    ur, uri = move_back(h, hi, r, ri, ur, uri)
    ur, uri = move_back(k, ki, ur, uri, 0.0, 0.0)
    store_pair(da + span_at * size + at, ur, uri, live)
    if INPUT:
        h, hi = tl.where(begin == 0, h, 0.0), tl.where(begin == 0, hi, 0.0)
        uq, uqi = move_back(h, hi, q, qi, uq, uqi)
        store_pair(dc + span_at * size + at, uq, uqi, live)
        tl.store(dskip + span_at * channels + channel, ds, mask=there)
    if begin == 0:
        q, qi = move_back(k, ki, q, qi, 0.0, 0.0)
        store_pair(dinit + row * size + at, q, qi, live)
