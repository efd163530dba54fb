"""A short causal depthwise convolution with bias, SiLU, resets and a carried window.

A program takes some channels through a span of time, a tile of (time, channels) after another. Every tap is a tile
shifted in time; all but the first come from the caches. Nothing but the inputs is kept. Backward makes the sums before
SiLU again, in one launch that gives their gradient and, summed over a span in registers and then by ``torch.sum``,
those of the weights; a second launch takes the gradient of the sums to the inputs. One launch would have to make W sums
again for every input, more arithmetic than its bytes leave time for. Sums are float32 whatever the inputs.

Floor, in bytes per position and channel of w bytes: forward reads x and writes y, 2 w; backward reads x and dy and
writes dx, 3 w. The launches move 2 w more for the gradient of the sums where SiLU comes after them, and
8 (W + 1) / SPAN of partial sums. Multiply-adds: W forward; 3 W backward with SiLU, else 2 W.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TIME = 32
"""Positions in a tile."""
CHANNELS = 64
"""Channels of a program."""
SPAN = 256
"""Positions of a program."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, reset: Tensor | None, silu: bool) -> Tensor:
    """y of ``ops.conv.causal_conv`` in the dtype that all given tensors promote to."""
    x, weight, window = _rows(x), weight.contiguous(), window.contiguous()
    batch, length, channels = x.shape
    dtype = x.dtype
    for t in (weight, window, *(() if bias is None else (bias,))):
        dtype = torch.promote_types(dtype, t.dtype)
    y = torch.empty(batch, length, channels, dtype=dtype, device=x.device)
    blocks, span = _shape(length, channels)
    _forward[batch * blocks, triton.cdiv(length, span)](
        x,
        weight,
        weight if bias is None else bias,
        window,
        x if reset is None else _flags(reset),
        y,
        length,
        channels,
        blocks,
        *x.stride()[:2],
        weight.shape[1],
        bias is not None,
        reset is not None,
        silu,
        span,
        min(TIME, span),
        CHANNELS,
        num_warps=4,
    )
    return y


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, reset: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, weight, bias and window, in their dtypes."""
    x, weight, window, dy = _rows(x), weight.contiguous(), window.contiguous(), dy.contiguous()
    batch, length, channels = x.shape
    taps = weight.shape[1]
    blocks, span = _shape(length, channels)
    spans = triton.cdiv(length, span)
    dz = torch.empty_like(dy) if silu else dy
    partial = torch.empty(batch, spans, taps + 1, channels, dtype=torch.float32, device=x.device)
    flags = x if reset is None else _flags(reset)
    options = (taps, bias is not None, reset is not None, silu, span, min(TIME, span), CHANNELS)
    width = triton.next_power_of_2(taps + 1)
    _backward_sums[batch * blocks, spans](
        x,
        weight,
        weight if bias is None else bias,
        window,
        flags,
        dy,
        dz,
        partial,
        length,
        channels,
        blocks,
        *x.stride()[:2],
        *options,
        width,
        num_warps=4,
    )
    dx = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    dwindow = torch.empty_like(window)
    _, span = _shape(length + taps - 1, channels)
    options = (taps, reset is not None, span, min(TIME, span), CHANNELS)
    _backward_inputs[batch * blocks, triton.cdiv(length + taps - 1, span)](
        weight, flags, dz, dx, dwindow, length, channels, blocks, *options, num_warps=4
    )
    total = partial.sum((0, 1))
    dbias = None if bias is None else total[taps].to(bias.dtype)
    return dx, total[:taps].T.to(weight.dtype), dbias, dwindow


def _rows(x: Tensor) -> Tensor:
    """``x`` with neighbouring channels side by side; a slice of a wider projection stays where it is."""
    return x if x.stride(2) == 1 else x.contiguous()


def _flags(reset: Tensor) -> Tensor:
    return reset.contiguous().view(torch.uint8)


def _shape(length: int, channels: int) -> tuple[int, int]:
    """Blocks of channels, and positions of a program: whole tiles."""
    return triton.cdiv(channels, CHANNELS), min(SPAN, max(16, triton.next_power_of_2(length)))


@triton.jit
def _inputs(x, window, time, channel, length, channels, x_time, TAPS: tl.constexpr):
    """Inputs at some positions, (TIME, CHANNELS) float32: before the first those of the window, zero after the last."""
    inside, there = (time >= 0) & (time < length), channel < channels
    here = time[:, None].to(tl.int64) * x_time + channel[None, :]
    value = tl.load(x + here, mask=inside[:, None] & there[None, :], other=0).to(tl.float32)
    if TAPS > 1:
        place = time + (TAPS - 1)
        held = (time < 0) & (place >= 0)
        here = place[:, None] * channels + channel[None, :]
        value += tl.load(window + here, mask=held[:, None] & there[None, :], other=0).to(tl.float32)
    return value


@triton.jit
def _cut(reset, time, length):
    """Whether a reset acts before some positions, (TIME, 1)."""
    return tl.load(reset + time, mask=(time >= 0) & (time < length), other=0)[:, None] != 0


@triton.jit
def _sums(
    x,
    weight,
    offset,
    window,
    reset,
    time,
    channel,
    length,
    channels,
    x_time,
    TAPS: tl.constexpr,
    RESET: tl.constexpr,
):
    """bias + sum over lags of weight x input, at some positions; ``offset`` is the bias, (1, CHANNELS)."""
    z = tl.zeros((time.shape[0], channel.shape[0]), tl.float32) + offset
    reached = tl.full((time.shape[0], 1), 1, tl.int1)
    for lag in tl.static_range(TAPS):
        value = _inputs(x, window, time - lag, channel, length, channels, x_time, TAPS)
        if RESET:
            if lag > 0:
                reached = reached & (_cut(reset, time - (lag - 1), length) == 0)
            value = tl.where(reached, value, 0.0)
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=channel < channels, other=0).to(tl.float32)
        z += tap[None, :] * value
    return z


@triton.jit
def _offset(bias, channel, channels, BIAS: tl.constexpr):
    offset = tl.zeros((channel.shape[0],), tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)
    return offset[None, :]


@triton.jit
def _forward(
    x,
    weight,
    bias,
    window,
    reset,
    y,
    length,
    channels,
    blocks,
    x_row,
    x_time,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    RESET: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    TIME: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    x += row * x_row
    window += row * (TAPS - 1) * channels
    y += row * length * channels
    if RESET:
        reset += row * length
    offset = _offset(bias, channel, channels, BIAS)
    for first in range(0, SPAN, TIME):
        time = tl.program_id(1) * SPAN + first + tl.arange(0, TIME)
        z = _sums(x, weight, offset, window, reset, time, channel, length, channels, x_time, TAPS, RESET)
        if SILU:
            z = z * tl.sigmoid(z)
        here = time[:, None].to(tl.int64) * channels + channel[None, :]
        tl.store(y + here, z, mask=(time < length)[:, None] & (channel < channels)[None, :])


@triton.jit
def _backward_sums(
    x,
    weight,
    bias,
    window,
    reset,
    dy,
    dz,
    partial,
    length,
    channels,
    blocks,
    x_row,
    x_time,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    RESET: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    TIME: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dz, the gradient of what goes into SiLU, and partial (B, spans, TAPS + 1, E): that of the taps, then the bias."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    x += row * x_row
    window += row * (TAPS - 1) * channels
    dy += row * length * channels
    dz += row * length * channels
    if RESET:
        reset += row * length
    partial += (row * tl.num_programs(1) + tl.program_id(1)) * (TAPS + 1) * channels
    there = (channel < channels)[None, :]
    nth = tl.arange(0, WIDTH)
    offset = _offset(bias, channel, channels, BIAS)
    sums = tl.zeros((WIDTH, CHANNELS), tl.float32)
    for first in range(0, SPAN, TIME):
        time = tl.program_id(1) * SPAN + first + tl.arange(0, TIME)
        here = time[:, None].to(tl.int64) * channels + channel[None, :]
        g = tl.load(dy + here, mask=(time < length)[:, None] & there, other=0).to(tl.float32)
        if SILU:
            z = _sums(x, weight, offset, window, reset, time, channel, length, channels, x_time, TAPS, RESET)
            s = tl.sigmoid(z)
            g = g * (s + z * s * (1 - s))
            tl.store(dz + here, g, mask=(time < length)[:, None] & there)
        sums += tl.where(nth[:, None] == TAPS, tl.sum(g, 0)[None, :], 0.0)
        for lag in tl.static_range(TAPS):
            value = _inputs(x, window, time - lag, channel, length, channels, x_time, TAPS)
            if RESET and lag > 0:
                g = tl.where(_cut(reset, time - (lag - 1), length), 0.0, g)
            sums += tl.where(nth[:, None] == TAPS - 1 - lag, tl.sum(value * g, 0)[None, :], 0.0)
    tl.store(partial + nth[:, None] * channels + channel[None, :], sums, mask=(nth <= TAPS)[:, None] & there)


@triton.jit
def _backward_inputs(
    weight,
    reset,
    dz,
    dx,
    dwindow,
    length,
    channels,
    blocks,
    TAPS: tl.constexpr,
    RESET: tl.constexpr,
    SPAN: tl.constexpr,
    TIME: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx, and dwindow: positions begin with the window's, at 1 - TAPS."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    dwindow += row * (TAPS - 1) * channels
    dz += row * length * channels
    dx += row * length * channels
    if RESET:
        reset += row * length
    there = (channel < channels)[None, :]
    for first in range(0, SPAN, TIME):
        time = tl.program_id(1) * SPAN + first + tl.arange(0, TIME) - (TAPS - 1)
        total = tl.zeros((TIME, CHANNELS), tl.float32)
        reached = tl.full((TIME, 1), 1, tl.int1)
        for lag in tl.static_range(TAPS):
            at = time + lag
            here = at[:, None].to(tl.int64) * channels + channel[None, :]
            g = tl.load(dz + here, mask=((at >= 0) & (at < length))[:, None] & there, other=0).to(tl.float32)
            if RESET:
                if lag > 0:
                    reached = reached & (_cut(reset, at, length) == 0)
                g = tl.where(reached, g, 0.0)
            tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=channel < channels, other=0).to(tl.float32)
            total += tap[None, :] * g
        here = time[:, None].to(tl.int64) * channels + channel[None, :]
        tl.store(dx + here, total, mask=((time >= 0) & (time < length))[:, None] & there)
        if TAPS > 1:
            here = (time + (TAPS - 1))[:, None] * channels + channel[None, :]
            tl.store(dwindow + here, total, mask=(time < 0)[:, None] & there)
