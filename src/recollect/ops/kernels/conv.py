"""Causal depthwise convolution with SiLU or without, by ranges of time: forward and backward in one pass each.

Units are (batch row, ``SPAN`` positions). Backward makes the convolution's output again, ``SPAN`` + W - 1 positions of
it, so that every unit owns its part of dx; the weights' gradients come one per unit, to be summed in order.
"""

from __future__ import annotations

import numpy as np

from recollect.ops.kernels.compiled import Array, arrays, exp, kernel, load, over_rows

__all__ = ["SPAN", "arrays", "backward", "forward", "over_rows"]

SPAN = 256


@kernel
def _reach(reset: Array, b: int, t: int, taps: int) -> int:
    """How many taps of position t look at positions since the last reset, its own included."""
    if reset.shape[1] == 0:
        return taps
    reach = 1
    while reach < taps and t - reach + 1 >= 0 and not reset[b, t - reach + 1]:
        reach += 1
    # Once past the start with no reset in between, the whole window counts.
    return taps if t - reach + 1 < 0 else reach


@kernel
def _convolve(row: Array, x: Array, weight: Array, bias: Array, window: Array, b: int, t: int, reach: int) -> None:
    last = weight.shape[0] - 1
    width = row.shape[0]
    if reach == 4 and t >= 3:
        x0, x1, x2, x3 = x[b, t], x[b, t - 1], x[b, t - 2], x[b, t - 3]
        w0, w1, w2, w3 = weight[last], weight[last - 1], weight[last - 2], weight[last - 3]
        # Two loops: with more arrays in one, a compiler gives up proving that they do not overlap.
        for i in range(width):
            row[i] = bias[i] + load(x0[i]) * w0[i] + load(x1[i]) * w1[i]
        for i in range(width):
            row[i] += load(x2[i]) * w2[i] + load(x3[i]) * w3[i]
        return
    for i in range(width):
        row[i] = bias[i]
    for tap in range(reach):
        source = x[b, t - tap] if t >= tap else window[b, last + t - tap]
        w = weight[last - tap]
        for i in range(width):
            row[i] += load(source[i]) * w[i]


@kernel
def forward(
    begin: int, end: int, x: Array, weight: Array, bias: Array, window: Array, reset: Array, silu: bool, y: Array
) -> None:
    """x, y (B, L, E); weight (W, E); window (B, W-1, E); reset (B, L) or (0, 0). x and window may be bfloat16."""
    length, width = x.shape[1], x.shape[2]
    spans = (length + SPAN - 1) // SPAN
    one = weight.dtype.type(1)
    for unit in range(begin, end):
        b, first = unit // spans, unit % spans * SPAN
        for t in range(first, min(first + SPAN, length)):
            row = y[b, t]
            _convolve(row, x, weight, bias, window, b, t, _reach(reset, b, t, weight.shape[0]))
            if silu:
                for i in range(width):
                    row[i] = row[i] / (one + exp(-row[i]))


@kernel
def backward(
    begin: int,
    end: int,
    x: Array,
    weight: Array,
    bias: Array,
    window: Array,
    reset: Array,
    silu: bool,
    dy: Array,
    dx: Array,
    dweight: Array,
    dbias: Array,
    dwindow: Array,
) -> None:
    """dweight (units, W, E), dbias (units, E) and dwindow come as zeros."""
    length, width = x.shape[1], x.shape[2]
    taps = weight.shape[0]
    spans = (length + SPAN - 1) // SPAN
    one = x.dtype.type(1)
    grad = np.empty(width, x.dtype)
    for unit in range(begin, end):
        b, first = unit // spans, unit % spans * SPAN
        stop = min(first + SPAN, length)
        for t in range(first, min(stop + taps - 1, length)):
            reach = _reach(reset, b, t, taps)
            dyt = dy[b, t]
            if silu:
                _convolve(grad, x, weight, bias, window, b, t, reach)
                for i in range(width):
                    s = one / (one + exp(-grad[i]))
                    grad[i] = dyt[i] * (s * (one + grad[i] * (one - s)))
            else:
                for i in range(width):
                    grad[i] = dyt[i]
            if t < stop:
                to, w, dw, db, source = dx[b, t], weight[taps - 1], dweight[unit, taps - 1], dbias[unit], x[b, t]
                for i in range(width):
                    to[i] = grad[i] * w[i]
                for i in range(width):
                    dw[i] += grad[i] * source[i]
                for i in range(width):
                    db[i] += grad[i]
            for tap in range(1, reach):
                back = t - tap
                w = weight[taps - 1 - tap]
                if first <= back < stop:
                    to = dx[b, back]
                    for i in range(width):
                        to[i] += grad[i] * w[i]
                elif back < 0:
                    to = dwindow[b, taps - 1 + back]
                    for i in range(width):
                        to[i] += grad[i] * w[i]
                if t < stop:
                    source = x[b, back] if back >= 0 else window[b, taps - 1 + back]
                    dw = dweight[unit, taps - 1 - tap]
                    for i in range(width):
                        dw[i] += grad[i] * source[i]
