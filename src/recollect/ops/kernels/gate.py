"""y * SiLU(z), alone or with a root-mean-square norm after it, row by row: forward and backward in one pass each.

Units are ``SPAN`` rows; the norm's weight gradient comes one per unit, to be summed in order.
"""

from __future__ import annotations

import numpy as np

from recollect.ops.kernels.compiled import Array, arrays, exp, kernel, load, one_of, over_rows, store

__all__ = ["SPAN", "arrays", "gate_backward", "gate_forward", "norm_backward", "norm_forward", "over_rows"]

SPAN = 256


@kernel
def gate_forward(begin: int, end: int, y: Array, z: Array, out: Array) -> None:
    """out = y z / (1 + e^-z); all (rows, E), any of them bfloat16, begin and end in units."""
    one = one_of(z)
    for row in range(begin * SPAN, min(end * SPAN, y.shape[0])):
        yr, zr, to = y[row], z[row], out[row]
        for i in range(to.shape[0]):
            gate = load(zr[i])
            store(to, i, load(yr[i]) * gate / (one + exp(-gate)))


@kernel
def gate_backward(begin: int, end: int, y: Array, z: Array, dout: Array, dy: Array, dz: Array) -> None:
    """Gradients of ``gate_forward``."""
    one = y.dtype.type(1)
    for row in range(begin * SPAN, min(end * SPAN, y.shape[0])):
        yr, zr, grad, to_y, to_z = y[row], z[row], dout[row], dy[row], dz[row]
        for i in range(yr.shape[0]):
            s = one / (one + exp(-zr[i]))
            to_y[i] = grad[i] * (zr[i] * s)
            to_z[i] = grad[i] * yr[i] * (s * (one + zr[i] * (one - s)))


@kernel
def norm_forward(
    begin: int, end: int, n_groups: int, eps: float, y: Array, z: Array, weight: Array, out: Array
) -> None:
    """v = y SiLU(z); out = weight v / sqrt(mean(v^2) + eps), the mean over each of ``n_groups`` parts of a row.

    y, z and out may be bfloat16.
    """
    one = weight.dtype.type(1)
    width = y.shape[1] // n_groups
    values = np.empty(width, weight.dtype)
    for row in range(begin * SPAN, min(end * SPAN, y.shape[0])):
        for group in range(n_groups):
            part = slice(group * width, (group + 1) * width)
            yr, zr, to, w = y[row, part], z[row, part], out[row, part], weight[part]
            squares = weight.dtype.type(0)
            for i in range(width):
                gate = load(zr[i])
                v = load(yr[i]) * gate / (one + exp(-gate))
                values[i] = v
                squares += v * v
            scale = weight.dtype.type(1 / np.sqrt(squares / width + eps))
            for i in range(width):
                store(to, i, values[i] * (scale * w[i]))


@kernel
def norm_backward(
    begin: int,
    end: int,
    n_groups: int,
    eps: float,
    y: Array,
    z: Array,
    weight: Array,
    dout: Array,
    dy: Array,
    dz: Array,
    dweight: Array,
) -> None:
    """Gradients of ``norm_forward``; dweight (units, E) comes as zeros."""
    one = y.dtype.type(1)
    width = y.shape[1] // n_groups
    values = np.empty(width, y.dtype)
    for row in range(begin * SPAN, min(end * SPAN, y.shape[0])):
        for group in range(n_groups):
            part = slice(group * width, (group + 1) * width)
            yr, zr, w, grad = y[row, part], z[row, part], weight[part], dout[row, part]
            to_y, to_z, dw = dy[row, part], dz[row, part], dweight[row // SPAN, part]
            squares, along = y.dtype.type(0), y.dtype.type(0)
            for i in range(width):
                s = one / (one + exp(-zr[i]))
                to_z[i] = s
                v = yr[i] * zr[i] * s
                values[i] = v
                squares += v * v
                along += v * grad[i] * w[i]
            scale = y.dtype.type(1 / np.sqrt(squares / width + eps))
            along = y.dtype.type(along * scale * scale / width)
            for i in range(width):
                s = to_z[i]
                dw[i] += grad[i] * values[i] * scale
                dv = scale * (grad[i] * w[i] - values[i] * along)
                to_y[i] = dv * (zr[i] * s)
                to_z[i] = dv * yr[i] * (s * (one + zr[i] * (one - s)))
