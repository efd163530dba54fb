"""The diagonal recurrence h_t = a_t h_{t-1} + b_t as loops over time: one row of one block of channels per thread.

Three layouts of a position: real numbers (N,); complex ones *interleaved* as PyTorch keeps them, (N, 2); and *split*
into all real and then all imaginary parts, (2, N), which vectorises best. The states are written over b, the adjoint
over the gradient of the states. The state is kept in an array of its own: reading it back from the row just written
would cost a check for overlap and a wait for the store at every position, four times the time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recollect.ops.kernels.compiled import Array, arrays, kernel, over_rows

LANES = 16
"""Blocks of channels are multiples of one vector, so that any number of threads gives the same bits."""

PARTIAL = 64
"""Positions summed into one partial gradient of a constant a: a plain float32 sum over a long row would drift."""


def scan_forward(a: Tensor, h: Tensor, h_init: Tensor, reset: Tensor | None, fresh: Tensor, *, split: bool) -> None:
    """Overwrite b with the states. All real, contiguous but for ``a`` and ``fresh``:

    h (B, L, N), (B, L, N, 2) or with ``split`` (B, L, 2, N); a without the first axes or with both; h_init without L;
    fresh, the state after a reset, without L and with or without B; reset (B, L) bool.
    """
    a, fresh = _broadcast(a, h, 2), _broadcast(fresh, h, 1)
    steps = tuple(int(n > 1) for n in (a.shape[0], a.shape[1], fresh.shape[0]))
    run, width, n_blocks = _plan(_FORWARD, h, split)
    flat = arrays(a, h, h_init, _flags(reset, h), fresh)
    over_rows(h.shape[0] * n_blocks, lambda begin, end: run(begin, end, n_blocks, width, *steps, *flat))


def scan_backward(
    a: Tensor, h: Tensor, h_init: Tensor, reset: Tensor | None, fresh: Tensor, g: Tensor, *, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite g, the gradient of the states h, with that of b; gradients of a, h_init and (for every row) fresh."""
    varying = a.dim() == h.dim()
    a, fresh = _broadcast(a, h, 2), _broadcast(fresh, h, 1)
    steps = tuple(int(n > 1) for n in (a.shape[0], a.shape[1], fresh.shape[0]))
    every = 1 if varying else PARTIAL
    grad_a = g.new_zeros(g.shape[0], -(-g.shape[1] // every), *g.shape[2:])
    grad_init, grad_fresh = torch.zeros_like(h_init), torch.zeros_like(h_init)
    run, width, n_blocks = _plan(_BACKWARD, h, split)
    flat = arrays(a, h, h_init, _flags(reset, h), fresh, g, grad_a, grad_init, grad_fresh)
    over_rows(h.shape[0] * n_blocks, lambda begin, end: run(begin, end, n_blocks, width, every, *steps, *flat))
    return grad_a if varying else grad_a.sum((0, 1)), grad_init, grad_fresh


def _broadcast(t: Tensor, h: Tensor, n_axes: int) -> Tensor:
    """``t`` with all ``n_axes`` leading axes, of size 1 where it had none."""
    missing = n_axes - (t.dim() - (h.dim() - 2))
    return t[(None,) * missing].contiguous() if missing else t.contiguous()


def _flags(reset: Tensor | None, h: Tensor) -> Tensor:
    """Resets as bytes; no position at all for none."""
    return h.new_empty((h.shape[0], 0), dtype=torch.uint8) if reset is None else reset.view(torch.uint8)


def _plan(kernels: dict[str, Callable[..., None]], h: Tensor, split: bool) -> tuple[Callable[..., None], int, int]:
    """The kernel of the layout, channels per block, and blocks: more than one only where rows leave threads idle."""
    layout = "real" if h.dim() == 3 else "split" if split else "interleaved"
    channels = h.shape[2] if layout == "interleaved" else h.shape[-1]
    wanted = -(-torch.get_num_threads() // h.shape[0])
    width = max(LANES, -(-channels // (wanted * LANES)) * LANES)
    return kernels[layout], width, -(-channels // width)


@kernel
def _real_forward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
) -> None:
    state = np.empty(width, h.dtype)
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[2])
        n = high - low
        state[:n] = h_init[row, low:high]
        for t in range(h.shape[1]):
            if reset.shape[1] and reset[row, t]:
                state[:n] = fresh[row * fresh_row, low:high]
            decay, x = a[row * a_row, t * a_step, low:high], h[row, t, low:high]
            for i in range(n):
                state[i] = decay[i] * state[i] + x[i]
                x[i] = state[i]


@kernel
def _split_forward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
) -> None:
    state = np.empty((2, width), h.dtype)
    s_re, s_im = state[0], state[1]
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[3])
        n = high - low
        state[:, :n] = h_init[row, :, low:high]
        for t in range(h.shape[1]):
            if reset.shape[1] and reset[row, t]:
                state[:, :n] = fresh[row * fresh_row, :, low:high]
            a_re, a_im = a[row * a_row, t * a_step, 0, low:high], a[row * a_row, t * a_step, 1, low:high]
            re, im = h[row, t, 0, low:high], h[row, t, 1, low:high]
            for i in range(n):
                x = a_re[i] * s_re[i] - a_im[i] * s_im[i] + re[i]
                y = a_re[i] * s_im[i] + a_im[i] * s_re[i] + im[i]
                re[i] = x
                im[i] = y
                s_re[i] = x
                s_im[i] = y


@kernel
def _interleaved_forward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
) -> None:
    state = np.empty((width, 2), h.dtype)
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[2])
        n = high - low
        state[:n] = h_init[row, low:high]
        for t in range(h.shape[1]):
            if reset.shape[1] and reset[row, t]:
                state[:n] = fresh[row * fresh_row, low:high]
            decay, pair = a[row * a_row, t * a_step, low:high], h[row, t, low:high]
            for i in range(n):
                x = decay[i, 0] * state[i, 0] - decay[i, 1] * state[i, 1] + pair[i, 0]
                y = decay[i, 0] * state[i, 1] + decay[i, 1] * state[i, 0] + pair[i, 1]
                pair[i, 0] = x
                pair[i, 1] = y
                state[i, 0] = x
                state[i, 1] = y


@kernel
def _real_backward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    every: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
    g: Array,
    grad_a: Array,
    grad_init: Array,
    grad_fresh: Array,
) -> None:
    carry = np.empty(width, h.dtype)
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[2])
        n = high - low
        carry[:] = 0
        for back in range(1, h.shape[1] + 1):
            t = h.shape[1] - back
            begins = reset.shape[1] > 0 and reset[row, t] > 0
            before = h[row, t - 1, low:high] if t > 0 else h_init[row, low:high]
            before = fresh[row * fresh_row, low:high] if begins else before
            decay, x, d = a[row * a_row, t * a_step, low:high], g[row, t, low:high], grad_a[row, t // every, low:high]
            for i in range(n):
                total = x[i] + carry[i]
                x[i] = total
                d[i] += total * before[i]
                carry[i] = decay[i] * total
            if begins:
                grad_fresh[row, low:high] += carry[:n]
                carry[:] = 0
        grad_init[row, low:high] = carry[:n]


@kernel
def _split_backward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    every: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
    g: Array,
    grad_a: Array,
    grad_init: Array,
    grad_fresh: Array,
) -> None:
    carry = np.empty((2, width), h.dtype)
    c_re, c_im = carry[0], carry[1]
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[3])
        n = high - low
        carry[:] = 0
        for back in range(1, h.shape[1] + 1):
            t = h.shape[1] - back
            begins = reset.shape[1] > 0 and reset[row, t] > 0
            before = h[row, t - 1] if t > 0 else h_init[row]
            before = fresh[row * fresh_row] if begins else before
            b_re, b_im = before[0, low:high], before[1, low:high]
            a_re, a_im = a[row * a_row, t * a_step, 0, low:high], a[row * a_row, t * a_step, 1, low:high]
            re, im = g[row, t, 0, low:high], g[row, t, 1, low:high]
            d_re, d_im = grad_a[row, t // every, 0, low:high], grad_a[row, t // every, 1, low:high]
            for i in range(n):
                x = re[i] + c_re[i]
                y = im[i] + c_im[i]
                re[i] = x
                im[i] = y
                d_re[i] += x * b_re[i] + y * b_im[i]
                d_im[i] += y * b_re[i] - x * b_im[i]
                c_re[i] = a_re[i] * x + a_im[i] * y
                c_im[i] = a_re[i] * y - a_im[i] * x
            if begins:
                grad_fresh[row, :, low:high] += carry[:, :n]
                carry[:] = 0
        grad_init[row, :, low:high] = carry[:, :n]


@kernel
def _interleaved_backward(
    begin: int,
    end: int,
    n_blocks: int,
    width: int,
    every: int,
    a_row: int,
    a_step: int,
    fresh_row: int,
    a: Array,
    h: Array,
    h_init: Array,
    reset: Array,
    fresh: Array,
    g: Array,
    grad_a: Array,
    grad_init: Array,
    grad_fresh: Array,
) -> None:
    carry = np.empty((width, 2), h.dtype)
    for part in range(begin, end):
        row, low = part // n_blocks, part % n_blocks * width
        high = min(low + width, h.shape[2])
        n = high - low
        carry[:] = 0
        for back in range(1, h.shape[1] + 1):
            t = h.shape[1] - back
            begins = reset.shape[1] > 0 and reset[row, t] > 0
            before = h[row, t - 1, low:high] if t > 0 else h_init[row, low:high]
            before = fresh[row * fresh_row, low:high] if begins else before
            decay, pair, d = (
                a[row * a_row, t * a_step, low:high],
                g[row, t, low:high],
                grad_a[row, t // every, low:high],
            )
            for i in range(n):
                x = pair[i, 0] + carry[i, 0]
                y = pair[i, 1] + carry[i, 1]
                pair[i, 0] = x
                pair[i, 1] = y
                d[i, 0] += x * before[i, 0] + y * before[i, 1]
                d[i, 1] += y * before[i, 0] - x * before[i, 1]
                carry[i, 0] = decay[i, 0] * x + decay[i, 1] * y
                carry[i, 1] = decay[i, 0] * y - decay[i, 1] * x
            if begins:
                grad_fresh[row, low:high] += carry[:n]
                carry[:] = 0
        grad_init[row, low:high] = carry[:n]


_FORWARD: dict[str, Callable[..., None]] = {
    "real": _real_forward,
    "split": _split_forward,
    "interleaved": _interleaved_forward,
}
_BACKWARD: dict[str, Callable[..., None]] = {
    "real": _real_backward,
    "split": _split_backward,
    "interleaved": _interleaved_backward,
}
