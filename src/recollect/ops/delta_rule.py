"""Matrix memories with a decay: the gated delta rule (arXiv 2412.06464), and plain writes for ``ops.mlstm``.

S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  y_t = S_t q_t  (per head; S, in code h, is P x N)

What is written is what the memory does not know yet: S_t = alpha_t S_{t-1} + beta_t e_t k_t^T with the error
e_t = v_t - alpha_t S_{t-1} k_t. Plain writes leave the second term of the error out. A reset at t empties the memory
before position t is consumed. Sums are taken in at least float32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.decayed import ResetMasks, Within
from recollect.ops.scan import accumulator_dtype


def delta_rule_step(
    q_BHN: Tensor,
    k_BHN: Tensor,
    v_BHP: Tensor,
    log_alpha_BH: Tensor,
    beta_BH: Tensor,
    h_BHPN: Tensor,
    *,
    delta: bool = True,
) -> tuple[Tensor, Tensor]:
    """One position of ``delta_rule``: y (B, H, P) and the next memory (B, H, P, N). O(B H P N)."""
    dtype = h_BHPN.dtype
    q, k, v, log_alpha, beta = (t.to(dtype) for t in (q_BHN, k_BHN, v_BHP, log_alpha_BH, beta_BH))
    h_BHPN = torch.exp(log_alpha)[:, :, None, None] * h_BHPN
    error_BHP = v - (h_BHPN @ k.unsqueeze(-1)).squeeze(-1) if delta else v
    h_BHPN = h_BHPN + (beta.unsqueeze(-1) * error_BHP).unsqueeze(-1) * k.unsqueeze(-2)
    return (h_BHPN @ q.unsqueeze(-1)).squeeze(-1), h_BHPN


def delta_rule_reference(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    log_alpha_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
    delta: bool = True,
) -> tuple[Tensor, Tensor]:
    """``delta_rule`` one position after the other."""
    h_BHPN = _initial(k_BLHN, v_BLHP, h_init)
    reset_steps = (None,) * k_BLHN.shape[1] if reset is None else reset.unbind(1)
    given = (q_BLHN, k_BLHN, v_BLHP, log_alpha_BLH, beta_BLH)
    outputs = []
    for q, k, v, log_alpha, beta, reset_B in zip(*(t.unbind(1) for t in given), reset_steps, strict=True):
        if reset_B is not None:
            h_BHPN = h_BHPN.masked_fill(reset_B[:, None, None, None], 0)
        y_BHP, h_BHPN = delta_rule_step(q, k, v, log_alpha, beta, h_BHPN, delta=delta)
        outputs.append(y_BHP)
    return torch.stack(outputs, 1), h_BHPN


def delta_rule(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    log_alpha_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
    chunk_size: int = 64,
    delta: bool = True,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, H, P) and the last memory (B, H, P, N).

    q, k (B, L, H, N), k of unit length if beta is to mean how much of an old value is replaced; v (B, L, H, P);
    log_alpha (B, L, H) finite, at most 0; beta (B, L, H) in [0, 2]; h_init (B, H, P, N), None for zero; reset (B, L)
    bool. Any L >= 1. ``delta=False`` writes v as it is: decayed linear attention. First derivatives only.

    On a CPU a compiled loop over positions: time O(B L H P N), and only the errors (B, L, H, P) are kept for backward.
    Elsewhere chunks of at most ``chunk_size`` positions Q with matrix products: the errors of a chunk solve a unit
    lower triangular system. Time O(B L H (Q (Q + P + N) + P N)), memory O(B L H (Q + P + N + P N / Q)).
    """
    dtype = accumulator_dtype(v_BLHP.dtype)
    q, k, v, log_alpha, beta = (t.to(dtype) for t in (q_BLHN, k_BLHN, v_BLHP, log_alpha_BLH, beta_BLH))
    h_BHPN = _initial(k, v, h_init)
    module = dispatch.kernels("delta_rule", q, k, v, log_alpha, beta, h_BHPN)
    if module is not None:
        return _Sequential.apply(q, k, v, log_alpha, beta, h_BHPN, reset, delta, module)  # pyright: ignore[reportReturnType]
    # Mixed-precision autocast would take the products in half precision.
    with torch.autocast(v.device.type, enabled=False):
        return _chunked(q, k, v, log_alpha, beta, h_BHPN, reset, chunk_size, delta)


class _Sequential(torch.autograd.Function):
    """The compiled loop of ``kernels.delta_rule``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_alpha: Tensor,
        beta: Tensor,
        start: Tensor,
        reset: Tensor | None,
        delta: bool,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        alpha = torch.exp(log_alpha)
        if reset is not None:
            alpha.masked_fill_(reset.unsqueeze(-1), 0)
        y, errors, last = module.forward(q, k, v, alpha, beta, start, delta)
        ctx.save_for_backward(q, k, v, alpha, beta, errors, start, last)
        ctx.delta, ctx.module = delta, module
        return y, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = ctx.module.backward(*ctx.saved_tensors, *grad_outputs, ctx.delta)
        return *grads, None, None, None


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    h_BHPN: Tensor,
    reset: Tensor | None,
    chunk_size: int,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """With g the cumulative log alpha of a chunk, D_ts = exp(g_t - g_s) and u = beta * e, for S_0 before the chunk

    u_t + beta_t sum_{s < t} D_ts (k_t . k_s) u_s = beta_t (v_t - exp(g_t) S_0 k_t),
    S_t = exp(g_t) S_0 + sum_{s <= t} D_ts u_s k_s^T,

    so u = V - W S_0^T with V and W free of S_0: they are had for all chunks side by side.
    """
    length = v.shape[1]
    n_chunks = -(-length // chunk_size)
    size = -(-length // n_chunks)

    def chunked(t: Tensor) -> Tensor:
        # Padding has beta = 0 and log alpha = 0: it writes nothing and decays nothing.
        padding = n_chunks * size - length
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) if padding else t
        return t.unflatten(1, (n_chunks, size))

    q_BCHQN, k_BCHQN, v_BCHQP = (chunked(t).transpose(2, 3).contiguous() for t in (q, k, v))
    g_BCHQ, beta_BCHQ1 = chunked(log_alpha).transpose(2, 3).cumsum(-1), chunked(beta).transpose(2, 3).unsqueeze(-1)
    masks = None if reset is None else ResetMasks(chunked(reset.unsqueeze(-1)).squeeze(-1))
    head_BCHQ, tail_BCHQ = torch.exp(g_BCHQ), torch.exp(g_BCHQ[..., -1:] - g_BCHQ)
    total_BCH = head_BCHQ[..., -1]
    if masks is not None:
        head_BCHQ = head_BCHQ * masks.from_start_BCQ.unsqueeze(2)
        tail_BCHQ = tail_BCHQ * masks.to_end_BCQ.unsqueeze(2)
        total_BCH = total_BCH * masks.whole_BC.unsqueeze(2)
    same = None if masks is None else masks.same_BCQS

    u_BCHQP, w_BCHQN = beta_BCHQ1 * v_BCHQP, None
    if delta:
        rest_BCHQN = beta_BCHQ1 * head_BCHQ.unsqueeze(-1) * k_BCHQN
        system_BCHQS = beta_BCHQ1 * _decays(g_BCHQ, same) * (k_BCHQN @ k_BCHQN.mT)
        solved: Tensor = _Solve.apply(system_BCHQS, torch.cat([u_BCHQP, rest_BCHQN], -1))  # pyright: ignore[reportAssignmentType]
        u_BCHQP, w_BCHQN = solved.split([v.shape[3], k.shape[3]], -1)
    write_BCHNQ = (tail_BCHQ.unsqueeze(-1) * k_BCHQN).mT
    h_BHNP, before, errors = h_BHPN.mT, [], []
    reads = (None,) * n_chunks if w_BCHQN is None else w_BCHQN.unbind(1)
    for u_BHQP, w_BHQN, write_BHNQ, total_BH in zip(
        u_BCHQP.unbind(1), reads, write_BCHNQ.unbind(1), total_BCH.unbind(1), strict=True
    ):
        before.append(h_BHNP)
        if w_BHQN is not None:
            u_BHQP = u_BHQP - w_BHQN @ h_BHNP
        errors.append(u_BHQP)
        h_BHNP = total_BH[:, :, None, None] * h_BHNP + write_BHNQ @ u_BHQP
    scores_BCHQS = q_BCHQN @ k_BCHQN.mT
    y_BCHQP: Tensor = Within.apply(scores_BCHQS, g_BCHQ, torch.stack(errors, 1), same)  # pyright: ignore[reportAssignmentType]
    y_BCHQP = torch.addcmul(y_BCHQP, head_BCHQ.unsqueeze(-1), q_BCHQN @ torch.stack(before, 1))
    return y_BCHQP.transpose(2, 3).flatten(1, 2)[:, :length], h_BHNP.mT


def _decays(g_BCHQ: Tensor, same_BCQS: Tensor | None) -> Tensor:
    """exp(g_q - g_s) for s < q in the same segment, zero elsewhere; only differences of at most 0 are exponentiated."""
    size = g_BCHQ.shape[-1]
    before = torch.ones(size, size, dtype=torch.bool, device=g_BCHQ.device).tril(-1)
    if same_BCQS is not None:
        before = (before & same_BCQS).unsqueeze(2)
    return (g_BCHQ.unsqueeze(-1) - g_BCHQ.unsqueeze(-2)).masked_fill(~before, -torch.inf).exp()


class _Solve(torch.autograd.Function):
    """X with (I + A) X = R for A strictly lower triangular, through the inverse, which backward needs as well."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, R: Tensor) -> Tensor:
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)
        X = inverse @ R
        ctx.save_for_backward(inverse, X)
        return X

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        inverse, X = ctx.saved_tensors
        dR = inverse.mT @ grad_outputs[0]
        return (dR @ X.mT).tril_(-1).neg_(), dR


def _initial(k: Tensor, v: Tensor, h_init: Tensor | None) -> Tensor:
    dtype = accumulator_dtype(v.dtype)
    if h_init is None:
        batch, _, n_heads, width = v.shape
        return torch.zeros(batch, n_heads, width, k.shape[3], dtype=dtype, device=v.device)
    return h_init.to(dtype)
