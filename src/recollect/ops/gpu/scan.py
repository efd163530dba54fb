"""The diagonal recurrence h_t = a_t h_{t-1} + b_t in one pass over memory: one row and block of channels per program.

A program is one warp and goes through its span of time in tiles of (time, channels), of which the next are on their way
to shared memory. Every thread holds all positions of one channel, so that the scan of a tile needs no exchange and its
products of a are never formed. To keep it so, the strides of memory are not specialised: Triton would have threads read
four neighbouring channels at once, and a warp several positions. Complex numbers are two real planes in registers, in
memory either *split*, all real and then all imaginary parts of a position, (2, N), or *interleaved* as PyTorch keeps
them, (N, 2). A reset at t makes the element (a_t, b_t) into (0, b_t + a_t fresh). Sums are float32 whatever the inputs.

Where rows and channels give too few programs to keep a GPU's memory busy, time is cut into spans: a first launch makes
every span's product and its last state from zero, the recurrence over those gives the state each span starts from, and
the main launch starts there. Gradients of a constant a are summed per row and span, then by ``torch.sum``.

Floor, in bytes per state of w bytes (4 real, 8 complex, with a constant a): forward reads b and writes h, 2 w; backward
reads the gradient of h, and h, and writes that of b, 3 w. Cut in spans, one more reading of b or of the gradient. An a
that varies adds a reading forward, a reading and a writing backward.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recollect.ops.gpu.scan_tiles import (
    add_carry,
    adjoint_elements,
    elements,
    load_cuts,
    load_decay,
    load_tile,
    load_vector,
    pick,
    scan_tile,
    store_tile,
    store_vector,
    times,
    times_conj,
)

TILE = 16
"""Positions that are scanned together: what a thread keeps in registers."""
CHANNELS = 32
"""Channels of a program, one for each thread of its warp."""
STAGES = 4
"""Tiles in shared memory, all but one on their way: 12 KB of complex states per warp."""
PROGRAMS = 264
"""Programs wanted, two for each of the 132 multiprocessors of an H100. A constant: sums must not depend on a device."""
SPAN_TILES = 8
"""Tiles in the shortest span: to fill and empty the queue of tiles takes a few."""


class _Plan(NamedTuple):
    complex: bool
    interleaved: bool
    rows: int
    length: int
    channels: int
    parts: int
    blocks: int  # of channels
    spans: int
    span: int  # positions, whole tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the kernels are told: the last two are how far positions, and the parts of a number, lie apart."""
        apart = 1 if self.interleaved else self.channels
        return self.length, self.channels, self.blocks, self.span, self.parts * self.channels, apart

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows * self.blocks, self.spans


def _plan(h: Tensor, split: bool) -> _Plan:
    parts = 1 if h.dim() == 3 else 2
    interleaved = parts == 2 and not split
    rows, length = h.shape[:2]
    channels = h.shape[2] if interleaved else h.shape[-1]
    blocks = triton.cdiv(channels, CHANNELS)
    programs = rows * blocks
    # Three readings instead of two: not for less than twice as many programs.
    most = max(1, length // (SPAN_TILES * TILE))
    spans = 1 if 2 * programs > PROGRAMS else min(triton.cdiv(PROGRAMS, programs), most)
    span = triton.cdiv(triton.cdiv(length, spans), TILE) * TILE
    spans = triton.cdiv(length, span)
    return _Plan(parts == 2, interleaved, rows, length, channels, parts, blocks, spans, span)


def scan_forward(
    a: Tensor,
    b: Tensor,
    h_init: Tensor,
    reset: Tensor | None,
    fresh: Tensor,
    *,
    split: bool,
    out: Tensor | None = None,
) -> Tensor:
    """All states, in float32 and the layout of b, written to ``out`` or over b. All real tensors:

    b (B, L, N), (B, L, N, 2) or with ``split`` (B, L, 2, N); a without the first two axes or as b; h_init (B, ...)
    without L; fresh, the state after a reset, without L and with or without B; reset (B, L) bool. What
    is written to is contiguous and float32.
    """
    plan = _plan(b, split)
    out = b if out is None else out
    a, b = a.contiguous(), b.contiguous()
    varying = a.dim() == b.dim()
    decay = a if varying else _planes(a, plan, 0)
    fresh_step, fresh = _fresh(fresh, plan)
    flags = b if reset is None else reset.contiguous().to(torch.int32)
    starts = _planes(h_init, plan, 1)
    options = (fresh_step, varying, reset is not None, plan.complex, plan.parts, 1 + plan.interleaved)
    if plan.spans > 1:
        product, last = b.new_empty(2, plan.rows, plan.spans, plan.parts, plan.channels, dtype=torch.float32)
        _summary[plan.grid](
            decay, b, flags, fresh, product, last, *plan.sizes, *options, TILE, CHANNELS, STAGES, False, num_warps=1
        )
        starts = _carries(product, last, starts)
    _forward[plan.grid](decay, b, flags, fresh, starts, out, *plan.sizes, *options, TILE, CHANNELS, STAGES, num_warps=1)
    return out


def scan_backward(
    a: Tensor,
    h: Tensor,
    h_init: Tensor,
    reset: Tensor | None,
    fresh: Tensor,
    g: Tensor,
    *,
    split: bool,
    last: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, h_init and (for every row) fresh, of float32 states h with gradient g and ``last`` more of the
    last state; that of b is written to ``out`` or over g. Layouts as in ``scan_forward``.

    The adjoint: g_t += conj(a_{t+1}) g_{t+1}, db_t = g_t, da_t = g_t conj(h_{t-1}).
    """
    plan = _plan(h, split)
    out = g if out is None else out
    a, h, g = a.contiguous(), h.contiguous(), g.contiguous()
    varying = a.dim() == h.dim()
    decay = a if varying else _planes(a, plan, 0)
    start = _planes(h_init, plan, 1)
    fresh_step, flat_fresh = _fresh(fresh, plan)
    flags = h if reset is None else reset.contiguous().to(torch.int32)
    ends = torch.zeros_like(start) if last is None else _planes(last, plan, 1)
    options = (fresh_step, varying, reset is not None, plan.complex, plan.parts, 1 + plan.interleaved)
    per_span = (plan.rows, plan.spans, plan.parts, plan.channels)
    if plan.spans > 1:
        product, first = h.new_empty(2, *per_span)
        _summary[plan.grid](
            decay,
            g,
            flags,
            flat_fresh,
            product,
            first,
            *plan.sizes,
            *options,
            TILE,
            CHANNELS,
            STAGES,
            True,
            num_warps=1,
        )
        ends = _carries(product.flip(1), first.flip(1), ends).flip(1)
    grad_a = torch.empty_like(h) if varying else h.new_empty(per_span)
    grad_fresh = h.new_empty(per_span if reset is not None else 0)
    _backward[plan.grid](
        decay,
        h,
        g,
        flags,
        flat_fresh,
        start,
        ends,
        out,
        grad_a,
        grad_fresh,
        *plan.sizes,
        *options,
        TILE,
        CHANNELS,
        STAGES,
        num_warps=1,
    )
    grad_init = _first_step(a[:, 0] if varying else a, out[:, 0], plan)
    if reset is None:
        grad_fresh = torch.zeros_like(h_init)
    else:
        grad_init = grad_init.masked_fill(reset[:, 0].view(-1, *(1,) * (grad_init.dim() - 1)), 0)
        grad_fresh = _unplanes(grad_fresh.sum(1), plan)
    return grad_a if varying else _unplanes(grad_a.sum((0, 1)), plan), grad_init, grad_fresh


def _planes(t: Tensor, plan: _Plan, n_axes: int) -> Tensor:
    """A small tensor with ``n_axes`` in front as float32 planes, (..., parts, N)."""
    t = t.float().mT if plan.interleaved else t.float()
    return t.reshape(*t.shape[:n_axes], plan.parts, plan.channels).contiguous()


def _unplanes(t: Tensor, plan: _Plan) -> Tensor:
    """Planes (..., parts, N) in the layout of the plan."""
    if not plan.complex:
        return t.squeeze(-2)
    return t.mT.contiguous() if plan.interleaved else t


def _fresh(fresh: Tensor, plan: _Plan) -> tuple[int, Tensor]:
    """How far rows lie apart, and the state after a reset as planes."""
    per_row = fresh.dim() == 1 + plan.parts
    return (plan.parts * plan.channels if per_row else 0), _planes(fresh, plan, int(per_row))


def _first_step(a: Tensor, g: Tensor, plan: _Plan) -> Tensor:
    """conj(a) g, the gradient of the state before the first position."""
    if not plan.complex:
        return a * g
    axis = -1 if plan.interleaved else -2
    (a_re, a_im), (re, im) = a.unbind(axis), g.unbind(axis)
    return torch.stack([a_re * re + a_im * im, a_re * im - a_im * re], axis)


def _carries(product: Tensor, last: Tensor, start: Tensor) -> Tensor:
    """The state that every span starts from, (B, spans, parts, N): the recurrence over spans, which are few."""
    if product.shape[2] == 1:
        after = scan_forward(product[:, :, 0], last[:, :, 0], start[:, 0], None, start[0, 0], split=False)[:, :, None]
    else:
        after = scan_forward(product, last, start, None, start[0], split=True)
    return torch.cat([start[:, None], after[:, :-1]], 1)


@triton.jit(do_not_specialize=["step", "apart"])
def _summary(
    a,
    b,
    reset,
    fresh,
    product,
    last,
    length,
    channels,
    blocks,
    span,
    step,
    apart,
    fresh_step,
    VARYING: tl.constexpr,
    RESET: tl.constexpr,
    COMPLEX: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """product, last (B, spans, parts, N): what every span multiplies a state with, and makes of zero."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel, nth = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TILE)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    p, pi = tl.full((CHANNELS,), 1.0, tl.float32), tl.zeros((CHANNELS,), tl.float32)
    s, si = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    c, ci = s, si
    if not VARYING:
        c, ci = load_vector(a, channel, channels, COMPLEX)
    f, fi = s, si
    if RESET:
        f, fi = load_vector(fresh + row * fresh_step, channel, channels, COMPLEX)
        reset += row * length
    if VARYING:
        a += row * length * step
    b += row * length * step
    for first in tl.range(0, stop - begin, TILE, num_stages=STAGES):
        if REVERSE:
            time = stop - 1 - first - nth
            d, di, x, xi = adjoint_elements(
                a, b, reset, time, channel, length, channels, step, apart, c, ci, VARYING, RESET, COMPLEX, STEP
            )
            # The last span may be ragged, and what it makes of zero is asked for.
            outside = (time < begin)[:, None]
            d, di = tl.where(outside, 1.0, d), tl.where(outside, 0.0, di)
            x, xi = tl.where(outside, 0.0, x), tl.where(outside, 0.0, xi)
        else:
            time = begin + first + nth
            d, di, x, xi = elements(
                a, b, reset, time, channel, length, channels, step, apart, c, ci, f, fi, VARYING, RESET, COMPLEX, STEP
            )
        x, xi = add_carry(x, xi, d, di, s, si, nth, COMPLEX)
        d, di, x, xi = scan_tile(d, di, x, xi, COMPLEX)
        s, si = pick(x, xi, nth, TILE - 1, COMPLEX)
        d_end, di_end = pick(d, di, nth, TILE - 1, COMPLEX)
        p, pi = times(d_end, di_end, p, pi, COMPLEX)
    here = (row * tl.num_programs(1) + tl.program_id(1)) * (PARTS * channels)
    store_vector(product + here, p, pi, channel, channels, COMPLEX)
    store_vector(last + here, s, si, channel, channels, COMPLEX)


@triton.jit(do_not_specialize=["step", "apart"])
def _forward(
    a,
    b,
    reset,
    fresh,
    starts,
    h,
    length,
    channels,
    blocks,
    span,
    step,
    apart,
    fresh_step,
    VARYING: tl.constexpr,
    RESET: tl.constexpr,
    COMPLEX: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The states of a span from the one it starts from, starts (B, spans, parts, N)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel, nth = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TILE)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    here = (row * tl.num_programs(1) + tl.program_id(1)) * (PARTS * channels)
    s, si = load_vector(starts + here, channel, channels, COMPLEX)
    c, ci = s, si
    if not VARYING:
        c, ci = load_vector(a, channel, channels, COMPLEX)
    f, fi = s, si
    if RESET:
        f, fi = load_vector(fresh + row * fresh_step, channel, channels, COMPLEX)
        reset += row * length
    if VARYING:
        a += row * length * step
    b += row * length * step
    h += row * length * step
    for first in tl.range(begin, stop, TILE, num_stages=STAGES):
        time = first + nth
        d, di, x, xi = elements(
            a, b, reset, time, channel, length, channels, step, apart, c, ci, f, fi, VARYING, RESET, COMPLEX, STEP
        )
        x, xi = add_carry(x, xi, d, di, s, si, nth, COMPLEX)
        d, di, x, xi = scan_tile(d, di, x, xi, COMPLEX)
        store_tile(h, x, xi, time, begin, stop, channel, channels, step, apart, COMPLEX, STEP)
        s, si = pick(x, xi, nth, TILE - 1, COMPLEX)


@triton.jit(do_not_specialize=["step", "apart"])
def _backward(
    a,
    h,
    g,
    reset,
    fresh,
    start,
    ends,
    grad_b,
    grad_a,
    grad_fresh,
    length,
    channels,
    blocks,
    span,
    step,
    apart,
    fresh_step,
    VARYING: tl.constexpr,
    RESET: tl.constexpr,
    COMPLEX: tl.constexpr,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_b, and grad_a where a varies, like h; otherwise grad_a, and grad_fresh always, per span like ``ends``.

    Tiles are read from the end of the span, their positions in falling order.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel, nth = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TILE)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, length)
    here = (row * tl.num_programs(1) + tl.program_id(1)) * (PARTS * channels)
    s, si = load_vector(ends + here, channel, channels, COMPLEX)
    u, ui = load_vector(start + row * (PARTS * channels), channel, channels, COMPLEX)
    c, ci = s, si
    if not VARYING:
        c, ci = load_vector(a, channel, channels, COMPLEX)
    f, fi = s, si
    if RESET:
        f, fi = load_vector(fresh + row * fresh_step, channel, channels, COMPLEX)
        reset += row * length
    if VARYING:
        a += row * length * step
    h += row * length * step
    g += row * length * step
    grad_b += row * length * step
    da, dai = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    df, dfi = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for first in tl.range(0, stop - begin, TILE, num_stages=STAGES):
        time = stop - 1 - first - nth
        d, di, x, xi = adjoint_elements(
            a, g, reset, time, channel, length, channels, step, apart, c, ci, VARYING, RESET, COMPLEX, STEP
        )
        v, vi = load_tile(h, time - 1, channel, length, channels, step, apart, COMPLEX, STEP)
        x, xi = add_carry(x, xi, d, di, s, si, nth, COMPLEX)
        d, di, x, xi = scan_tile(d, di, x, xi, COMPLEX)
        store_tile(grad_b, x, xi, time, begin, stop, channel, channels, step, apart, COMPLEX, STEP)
        s, si = pick(x, xi, nth, TILE - 1, COMPLEX)

        inside = (time >= begin)[:, None]
        x, xi = tl.where(inside, x, 0.0), tl.where(inside, xi, 0.0)
        very_first = (time == 0)[:, None]
        v, vi = tl.where(very_first, u[None, :], v), tl.where(very_first, ui[None, :], vi)
        if RESET:
            cut = load_cuts(reset, time, length)
            v, vi = tl.where(cut, f[None, :], v), tl.where(cut, fi[None, :], vi)
            e, ei = load_decay(a, time, channel, length, channels, step, apart, c, ci, VARYING, COMPLEX, STEP)
            w, wi = times_conj(e, ei, tl.where(cut, x, 0.0), tl.where(cut, xi, 0.0), COMPLEX)
            df, dfi = df + tl.sum(w, 0), dfi + tl.sum(wi, 0)
        x, xi = times_conj(v, vi, x, xi, COMPLEX)
        if VARYING:
            store_tile(
                grad_a + row * length * step, x, xi, time, begin, stop, channel, channels, step, apart, COMPLEX, STEP
            )
        else:
            da, dai = da + tl.sum(x, 0), dai + tl.sum(xi, 0)
    if RESET:
        store_vector(grad_fresh + here, df, dfi, channel, channels, COMPLEX)
    if not VARYING:
        store_vector(grad_a + here, da, dai, channel, channels, COMPLEX)
