"""The matrix memory of the mLSTM (arXiv 2405.04517, section 2.3): exponential gates, held in range by a stabiliser.

m_t = max(log f_t + m_{t-1}, i_t),  f'_t = exp(log f_t + m_{t-1} - m_t),  i'_t = exp(i_t - m_t),
C_t = f'_t C_{t-1} + i'_t v_t k_t^T / sqrt(N),  n_t = f'_t n_{t-1} + i'_t k_t / sqrt(N)  (per head),
y_t = C_t q_t / max(|n_t . q_t|, exp(-m_t)),  with f = sigmoid of its pre-activation, i the logarithm of the input gate.

Memories start at C = 0, n = 0, m = 0, and a reset at t puts them back there before position t is consumed. y does not
depend on where m starts: C exp(m) and n exp(m) are free of it. Sums are taken in at least float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.delta_rule import delta_rule
from recollect.ops.scan import accumulator_dtype

M_BOUND = 80.0
"""exp(-m) is taken of m within this bound, where float32 holds it: beyond it the divisor differs only for outputs that
are zero to 34 decimals, or whose keys are as nearly orthogonal to the query."""


class MatrixMemory(NamedTuple):
    """C (B, H, P, N), n (B, H, N), m (B, H)."""

    C: Tensor
    n: Tensor
    m: Tensor


def mlstm_init(
    batch: int, n_heads: int, width: int, d_state: int, *, device: torch.device | str | None, dtype: torch.dtype
) -> MatrixMemory:
    """An empty memory."""
    sizes = ((batch, n_heads, width, d_state), (batch, n_heads, d_state), (batch, n_heads))
    return MatrixMemory(*(torch.zeros(size, device=device, dtype=dtype) for size in sizes))


def mlstm_step(
    q_BHN: Tensor, k_BHN: Tensor, v_BHP: Tensor, i_BH: Tensor, f_BH: Tensor, memory: MatrixMemory
) -> tuple[Tensor, MatrixMemory]:
    """One position of ``mlstm``: y (B, H, P) and the next memory. O(B H P N)."""
    c, n, m_before = memory
    q, k, v, i, f = (t.to(c.dtype) for t in (q_BHN, k_BHN, v_BHP, i_BH, f_BH))
    k = k / math.sqrt(k.shape[-1])
    log_f = F.logsigmoid(f)
    m = torch.maximum(log_f + m_before, i)
    keep, add = torch.exp(log_f + (m_before - m)), torch.exp(i - m)
    c = keep[..., None, None] * c + (add.unsqueeze(-1) * v).unsqueeze(-1) * k.unsqueeze(-2)
    n = keep.unsqueeze(-1) * n + add.unsqueeze(-1) * k
    read, mass = (c @ q.unsqueeze(-1)).squeeze(-1), (n * q).sum(-1)
    return _normalised(read, mass, m), MatrixMemory(c, n, m)


def mlstm_reference(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    i_BLH: Tensor,
    f_BLH: Tensor,
    *,
    memory: MatrixMemory | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, MatrixMemory]:
    """``mlstm`` one position after the other, as the equations are written."""
    held = _initial(k_BLHN, v_BLHP, memory)
    reset_steps = (None,) * k_BLHN.shape[1] if reset is None else reset.unbind(1)
    given = (q_BLHN, k_BLHN, v_BLHP, i_BLH, f_BLH)
    outputs = []
    for q, k, v, i, f, reset_B in zip(*(t.unbind(1) for t in given), reset_steps, strict=True):
        if reset_B is not None:
            kept = (part.masked_fill(reset_B.view(-1, *(1,) * (part.dim() - 1)), 0) for part in held)
            held = MatrixMemory(*kept)
        y_BHP, held = mlstm_step(q, k, v, i, f, held)
        outputs.append(y_BHP)
    return torch.stack(outputs, 1), held


def mlstm(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    i_BLH: Tensor,
    f_BLH: Tensor,
    *,
    memory: MatrixMemory | None = None,
    reset: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, MatrixMemory]:
    """Outputs y (B, L, H, P) and the last memory.

    q, k (B, L, H, N); v (B, L, H, P); i, f (B, L, H) pre-activations of the input and forget gates; ``memory`` None for
    an empty one; reset (B, L) bool. Any L >= 1. First derivatives only.

    Once m is known the memory is a decayed sum of outer products, and n is one more row of C: time and memory are those
    of ``ops.delta_rule.delta_rule`` without the delta term, at P + 1 values.
    """
    C, n, m_before = _initial(k_BLHN, v_BLHP, memory)
    q, k, v, i, f = (t.to(C.dtype) for t in (q_BLHN, k_BLHN, v_BLHP, i_BLH, f_BLH))
    log_f = F.logsigmoid(f)
    m = stabiliser(log_f, i, m_before, reset)
    previous = torch.cat([m_before.unsqueeze(1), m[:, :-1]], 1)
    if reset is not None:
        previous = previous.masked_fill(reset.unsqueeze(-1), 0)
    read, last = delta_rule(
        q,
        k / math.sqrt(k.shape[-1]),
        torch.cat([v, torch.ones_like(v[..., :1])], -1),
        # Neighbouring m are subtracted first: they may be large, their difference is exact.
        log_f + (previous - m),
        torch.exp(i - m),
        h_init=torch.cat([C, n.unsqueeze(2)], 2),
        reset=reset,
        chunk_size=chunk_size,
        delta=False,
    )
    y = _normalised(read[..., :-1], read[..., -1], m)
    return y, MatrixMemory(last[:, :, :-1], last[:, :, -1], m[:, -1])


def stabiliser(log_f_BLH: Tensor, i_BLH: Tensor, m_BH: Tensor, reset: Tensor | None = None) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, i_t) for all t (B, L, H), from ``m`` and from 0 after every reset.

    The operator (f1, i1), (f2, i2) -> (f1 + f2, max(i1 + f2, i2)) is associative: log2(L) doublings, without the
    cancellation that differences of cumulative sums would bring. O(B L H log L).
    """
    if reset is not None:
        fresh = reset.unsqueeze(-1)
        i_BLH = torch.where(fresh, torch.maximum(log_f_BLH, i_BLH), i_BLH)
        log_f_BLH = log_f_BLH.masked_fill(fresh, -torch.inf)
    f, i = log_f_BLH, torch.cat([torch.maximum(i_BLH[:, :1], log_f_BLH[:, :1] + m_BH.unsqueeze(1)), i_BLH[:, 1:]], 1)
    reach = 1
    while reach < i.shape[1]:
        i = torch.cat([i[:, :reach], torch.maximum(i[:, reach:], i[:, :-reach] + f[:, reach:])], 1)
        f = torch.cat([f[:, :reach], f[:, reach:] + f[:, :-reach]], 1)
        reach *= 2
    return i


def _normalised(read: Tensor, mass: Tensor, m: Tensor) -> Tensor:
    return read / torch.maximum(mass.abs(), torch.exp(-m.clamp(-M_BOUND, M_BOUND))).unsqueeze(-1)


def _initial(k: Tensor, v: Tensor, memory: MatrixMemory | None) -> MatrixMemory:
    dtype = accumulator_dtype(v.dtype)
    if memory is None:
        return mlstm_init(v.shape[0], v.shape[2], v.shape[3], k.shape[3], device=v.device, dtype=dtype)
    return MatrixMemory(*(part.to(dtype) for part in memory))
