"""The selective scan, position after position, for one (batch row, share of the channels) at a time.

A block of ``BLOCK`` channels is carried through all of time with its state laid out (N, BLOCK), so that every loop runs
over channels. States are stored every ``SPAN`` positions; backward makes the states and decays of one span again, in a
buffer that stays in cache, and runs the adjoint

    g_t = dy_t C_t + a_{t+1} g_{t+1},  da_t = g_t h_{t-1},  a_t = exp(dt_t A)

over it. A reset at t makes a_t zero. dB and dC, sums over channels, are added block by block within a share and come
one per share; dA and dD come one per batch row.
"""

from __future__ import annotations

import numpy as np

from recollect.ops.kernels.compiled import Array, arrays, exp, kernel, over_rows

__all__ = ["BLOCK", "SPAN", "arrays", "backward", "forward", "over_rows"]

BLOCK = 128
SPAN = 32
TERMS = 17


@kernel
def _step_sizes(step: Array, raw: Array, softplus: bool) -> None:
    """step = log(1 + e^raw) where ``softplus``, else raw.

    With e = e^-|raw| it is max(raw, 0) + log(1 + e), and log(1 + e) = 2 artanh(s) = 2 (s + s^3 / 3 + ...) for
    s = e / (2 + e) <= 1 / 3, which keeps its digits where e is small.
    """
    if not softplus:
        for i in range(step.shape[0]):
            step[i] = raw[i]
        return
    one, two, zero = raw.dtype.type(1), raw.dtype.type(2), raw.dtype.type(0)
    for i in range(step.shape[0]):
        e = exp(-abs(raw[i]))
        s = e / (two + e)
        square = s * s
        series = one / raw.dtype.type(2 * TERMS - 1)
        for k in range(TERMS - 1):
            series = series * square + one / raw.dtype.type(2 * (TERMS - 2 - k) + 1)
        step[i] = max(raw[i], zero) + two * s * series


@kernel
def forward(
    begin: int,
    end: int,
    shares: int,
    softplus: bool,
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    reset: Array,
    state: Array,
    y: Array,
    kept: Array,
) -> None:
    """u, dt, y (B, L, E); A (N, E); B, C (B, L, N); reset (B, L) or (0, 0); ``state`` (B, N, E) is moved to the end;
    ``kept`` (B, spans or 0, N, E) gets the states at the starts of spans.
    """
    length, channels, d_state = u.shape[1], u.shape[2], A.shape[0]
    blocks = (channels + BLOCK - 1) // BLOCK
    h = np.empty((d_state, BLOCK), u.dtype)
    steps, writes = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for unit in range(begin, end):
        b, share = unit // shares, unit % shares
        for block in range(blocks * share // shares, blocks * (share + 1) // shares):
            e = block * BLOCK
            width = min(BLOCK, channels - e)
            step, write = steps[:width], writes[:width]
            skip = D[e : e + width]
            for n in range(d_state):
                h[n, :width] = state[b, n, e : e + width]
            for t in range(length):
                if kept.shape[1] > 0 and t % SPAN == 0:
                    for n in range(d_state):
                        kept[b, t // SPAN, n, e : e + width] = h[n, :width]
                ut, yt, Bt, Ct = u[b, t, e : e + width], y[b, t, e : e + width], B[b, t], C[b, t]
                _step_sizes(step, dt[b, t, e : e + width], softplus)
                for i in range(width):
                    write[i] = step[i] * ut[i]
                    yt[i] = skip[i] * ut[i]
                if reset.shape[1] > 0 and reset[b, t]:
                    h[:] = 0
                for n in range(d_state):
                    hn, An, Bn, Cn = h[n, :width], A[n, e : e + width], Bt[n], Ct[n]
                    for i in range(width):
                        value = exp(step[i] * An[i]) * hn[i] + write[i] * Bn
                        hn[i] = value
                        yt[i] += Cn * value
            for n in range(d_state):
                state[b, n, e : e + width] = h[n, :width]


@kernel
def backward(
    begin: int,
    end: int,
    shares: int,
    softplus: bool,
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    reset: Array,
    kept: Array,
    dy: Array,
    dstate: Array,
    du: Array,
    ddt: Array,
    dA: Array,
    dB: Array,
    dC: Array,
    dD: Array,
) -> None:
    """``dstate`` (B, N, E) holds the last state's gradient and is moved to the first one's; dA (B, N, E), dD (B, E) and
    dB, dC (shares, B, L, N) come as zeros.
    """
    length, channels, d_state = u.shape[1], u.shape[2], A.shape[0]
    blocks = (channels + BLOCK - 1) // BLOCK
    one, zero = u.dtype.type(1), u.dtype.type(0)
    states = np.empty((SPAN + 1, d_state, BLOCK), u.dtype)
    decays = np.empty((SPAN, d_state, BLOCK), u.dtype)
    steps = np.empty((SPAN, BLOCK), u.dtype)
    carry, slope = np.empty((d_state, BLOCK), u.dtype), np.empty((d_state, BLOCK), u.dtype)
    writes, dwrites, dsteps = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for unit in range(begin, end):
        b, share = unit // shares, unit % shares
        for block in range(blocks * share // shares, blocks * (share + 1) // shares):
            e = block * BLOCK
            width = min(BLOCK, channels - e)
            write, dwrite, dstep = writes[:width], dwrites[:width], dsteps[:width]
            skip, dskip = D[e : e + width], dD[b, e : e + width]
            slope[:] = 0
            for n in range(d_state):
                carry[n, :width] = dstate[b, n, e : e + width]
            spans = (length + SPAN - 1) // SPAN
            for back in range(spans):
                first = (spans - 1 - back) * SPAN
                count = min(SPAN, length - first)
                for n in range(d_state):
                    states[0, n, :width] = kept[b, spans - 1 - back, n, e : e + width]
                for k in range(count):
                    t = first + k
                    ut, step, Bt = u[b, t, e : e + width], steps[k, :width], B[b, t]
                    _step_sizes(step, dt[b, t, e : e + width], softplus)
                    for i in range(width):
                        write[i] = step[i] * ut[i]
                    keep = zero if reset.shape[1] > 0 and reset[b, t] else one
                    for n in range(d_state):
                        before, after, decay = states[k, n, :width], states[k + 1, n, :width], decays[k, n, :width]
                        An, Bn = A[n, e : e + width], Bt[n]
                        for i in range(width):
                            a = exp(step[i] * An[i]) * keep
                            decay[i] = a
                            after[i] = a * before[i] + write[i] * Bn
                for forth in range(count):
                    k = count - 1 - forth
                    t = first + k
                    ut, step, Bt, Ct = u[b, t, e : e + width], steps[k, :width], B[b, t], C[b, t]
                    dyt, dut, ddtt = dy[b, t, e : e + width], du[b, t, e : e + width], ddt[b, t, e : e + width]
                    for i in range(width):
                        write[i] = step[i] * ut[i]
                        dwrite[i] = zero
                        dstep[i] = zero
                    for n in range(d_state):
                        before, after, decay = states[k, n, :width], states[k + 1, n, :width], decays[k, n, :width]
                        An, Bn, Cn, gn, dAn = A[n, e : e + width], Bt[n], Ct[n], carry[n, :width], slope[n, :width]
                        to_B, to_C = zero, zero
                        for i in range(width):
                            g = gn[i] + Cn * dyt[i]
                            to_C += dyt[i] * after[i]
                            to_B += g * write[i]
                            dwrite[i] += g * Bn
                            g *= decay[i]
                            gn[i] = g
                            dlog = g * before[i]
                            dstep[i] += dlog * An[i]
                            dAn[i] += dlog * step[i]
                        dB[share, b, t, n] += to_B
                        dC[share, b, t, n] += to_C
                    raw = dt[b, t, e : e + width]
                    for i in range(width):
                        dskip[i] += dyt[i] * ut[i]
                        dut[i] = dwrite[i] * step[i] + dyt[i] * skip[i]
                        ddtt[i] = dstep[i] + dwrite[i] * ut[i]
                    if softplus:
                        for i in range(width):
                            ddtt[i] /= one + exp(-raw[i])
            for n in range(d_state):
                dA[b, n, e : e + width] = slope[n, :width]
                dstate[b, n, e : e + width] = carry[n, :width]
