"""The state-space dual form of Mamba-2 (arXiv 2405.21060, section 6): scalar decay per head, outer-product writes.

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t  (per head, h of size P x N)

A reset at t empties the state before position t is consumed. Sums are taken in at least float32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.decayed import ResetMasks, Within
from recollect.ops.scan import accumulator_dtype

STEPS_STATES = 16
"""At most so many states are taken one position after the other in compiled form; more are cheaper in chunks."""
STEPS_CHUNK = 32
"""Positions whose states backward makes again at a time: few enough for a cache."""


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None,
    h_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One position of ``ssd``: y (B, H, P) and the next state (B, H, P, N). O(B H P N)."""
    n_heads, dtype = x_BHP.shape[1], h_BHPN.dtype
    x_BHP, dt_BH = x_BHP.to(dtype), dt_BH.to(dtype)
    per_group = n_heads // B_BGN.shape[1]
    B_BHN = B_BGN.to(dtype).repeat_interleave(per_group, 1)
    C_BHN = C_BGN.to(dtype).repeat_interleave(per_group, 1)
    decay_BH = torch.exp(dt_BH * A_H.to(dtype))
    write_BHPN = (x_BHP * dt_BH.unsqueeze(-1)).unsqueeze(-1) * B_BHN.unsqueeze(-2)
    h_BHPN = decay_BH[:, :, None, None] * h_BHPN + write_BHPN
    y_BHP = (h_BHPN * C_BHN.unsqueeze(-2)).sum(-1)
    if D_H is not None:
        y_BHP = y_BHP + D_H.to(dtype).unsqueeze(-1) * x_BHP
    return y_BHP, h_BHPN


def ssd_reference(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ssd`` one position after the other, as the equation is written."""
    h_BHPN = _initial(x_BLHP, B_BLGN, h_init)
    reset_steps = (None,) * x_BLHP.shape[1] if reset is None else reset.unbind(1)
    steps = zip(x_BLHP.unbind(1), dt_BLH.unbind(1), B_BLGN.unbind(1), C_BLGN.unbind(1), reset_steps, strict=True)
    outputs = []
    for x_BHP, dt_BH, B_BGN, C_BGN, reset_B in steps:
        if reset_B is not None:
            h_BHPN = h_BHPN.masked_fill(reset_B[:, None, None, None], 0)
        y_BHP, h_BHPN = ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, h_BHPN)
        outputs.append(y_BHP)
    return torch.stack(outputs, 1), h_BHPN


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, H, P) and the last state (B, H, P, N), parallel over time.

    x (B, L, H, P); dt (B, L, H) positive step sizes; A (H,) negative; B, C (B, L, G, N) with G dividing H (heads of a
    group share them); D (H,) skip; h_init (B, H, P, N), None for zero; reset (B, L) bool. Any L >= 1.

    The sequence is cut into equal chunks of at most ``chunk_size`` positions Q: quadratic attention with decays inside,
    one state per chunk between. Time O(B L H (Q P + P N)), memory O(B L H (Q + P N / Q)); a compiled kernel
    (``ops.dispatch``) keeps the (Q, Q) arrays in cache, which leaves O(B L H P N / Q). On a GPU an installed library
    is used (``ops.libraries``), in chunks of its own; in half precision it rounds y. First derivatives only.
    """
    # Mixed-precision autocast would take the products in half precision.
    with torch.autocast(x_BLHP.device.type, enabled=False):
        dtype = accumulator_dtype(x_BLHP.dtype)
        given = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, h_init)
        asked = dispatch.Asked(
            x_BLHP.device,
            torch.promote_types(x_BLHP.dtype, torch.promote_types(B_BLGN.dtype, C_BLGN.dtype)),
            *x_BLHP.shape,
            d_state=B_BLGN.shape[3],
            groups=B_BLGN.shape[2],
            reset=reset is not None,
            h_init=h_init is not None,
            gradients=dispatch.asks_gradients(*given),
        )
        library = dispatch.explain_library("ssd", asked).path
        if library != "torch":
            from recollect.ops import libraries

            y, last = libraries.ssd(library, *given, reset)  # pyright: ignore[reportCallIssue] its decorator
            return y.to(dtype), last
        x, dt, A, B, C = (t.to(dtype) for t in (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN))
        D = None if D_H is None else D_H.to(dtype)
        h = None if h_init is None else h_init.to(dtype)
        module = dispatch.kernels("ssd_steps" if B.shape[3] <= STEPS_STATES else "ssd", x, dt, A, B, C)
        if module is None:
            return _chunked(x, dt, A, B, C, D, h, reset, chunk_size)
        return _fused(module, x, dt, A, B, C, D, h, reset, chunk_size)


def _fused(
    module: ModuleType,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    length, n_heads, width = x.shape[1:]
    d_state = B.shape[3]
    keys, queries = B, C
    more_N, more_P = -d_state % 4, -width % 4
    if more_N or more_P:
        x, keys, queries = F.pad(x, (0, more_P)), F.pad(B, (0, more_N)), F.pad(C, (0, more_N))
        h = None if h is None else F.pad(h, (0, more_N, 0, more_P))
    if h is None:
        h = x.new_zeros(x.shape[0], n_heads, x.shape[3], keys.shape[3])
    chunk_size = chunk_size if keys.shape[3] > STEPS_STATES else min(chunk_size, STEPS_CHUNK)
    size = -(-length // -(-length // chunk_size))
    skip = x.new_zeros(n_heads) if D is None else D
    y, last = cast(
        tuple[Tensor, Tensor], _Fused.apply(module, x, dt, A, keys, queries, skip, h, reset, size + -size % 4)
    )
    return (y[..., :width], last[:, :, :width, :d_state]) if more_N or more_P else (y, last)


class _Fused(torch.autograd.Function):
    """``ops.kernels.ssd``: states at the starts of chunks are kept for backward, everything else is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        h: Tensor,
        reset: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        batch, length, n_heads, width = x.shape
        n_groups, d_state = B.shape[2:]
        # Shares of a group's heads give few rows of a batch something to do on every thread; they depend on sizes only.
        parts = min(n_heads // n_groups, -(-8 // (batch * n_groups)))
        given = [t.contiguous() for t in (x, dt, A, B, C, D)]
        given.append(torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous())
        state = h.mT.clone(memory_format=torch.contiguous_format)
        n_kept = -(-length // size) if any(ctx.needs_input_grad) else 0
        starts = x.new_empty(batch, n_kept, n_heads, d_state, width)
        y = torch.empty_like(given[0])
        arrays = module.arrays(*given, state, y, starts)
        module.over_rows(batch * n_groups * parts, lambda b, e: module.forward(b, e, parts, size, *arrays))
        ctx.save_for_backward(*given, starts)
        ctx.module, ctx.parts, ctx.size = module, parts, size
        return y, state.mT

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        module, parts, size = ctx.module, ctx.parts, ctx.size
        x, dt, A, B, C, D, reset, starts = ctx.saved_tensors
        batch, _, n_heads, _ = x.shape
        dstate = dlast.mT.clone(memory_format=torch.contiguous_format)
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        dA, dD = x.new_zeros(batch, n_heads), x.new_zeros(batch, n_heads)
        dB, dC = (t.new_empty(parts, *t.shape) for t in (B, C))
        arrays = module.arrays(x, dt, A, B, C, D, reset, starts, dy.contiguous(), dstate, dx, ddt, dA, dB, dC, dD)
        rows = batch * B.shape[2] * parts
        module.over_rows(rows, lambda b, e: module.backward(b, e, parts, size, *arrays))
        dB, dC = (t[0] if parts == 1 else t.sum(0) for t in (dB, dC))
        return None, dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dstate.mT, None, None


def _chunked(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    h_init: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    batch, length, n_heads, width = x_BLHP.shape
    n_groups, d_state = B_BLGN.shape[2:]
    heads = n_heads // n_groups
    h_BHPN = None if h_init is None else _initial(x_BLHP, B_BLGN, h_init)
    dtype = accumulator_dtype(x_BLHP.dtype)
    x, dt, B, C = (t.to(dtype) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    n_chunks = -(-length // chunk_size)
    size = -(-length // n_chunks)

    def chunked(t: Tensor) -> Tensor:
        # Padding has dt = 0: it writes nothing and decays nothing, so the last state needs no correction.
        padding = n_chunks * size - length
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) if padding else t
        return t.unflatten(1, (n_chunks, size))

    xdt_BCQHP = chunked(x * dt.unsqueeze(-1))
    log_BCHQ = chunked(dt * A_H.to(dtype)).transpose(2, 3).contiguous().cumsum(-1)
    B_BCGQN, C_BCGQN = chunked(B).transpose(2, 3), chunked(C).transpose(2, 3)
    masks = None if reset is None else ResetMasks(chunked(reset.unsqueeze(-1)).squeeze(-1))

    scores_BCGQS = C_BCGQN @ B_BCGQN.mT
    same = None if masks is None else masks.same_BCQS
    y_BCHQP: Tensor = Within.apply(scores_BCGQS, log_BCHQ, xdt_BCQHP.transpose(2, 3), same)  # pyright: ignore[reportAssignmentType]

    # What each chunk writes into its last state, one product per group: (N x Q) (Q x heads P).
    tail_BCHQ = torch.exp(log_BCHQ[..., -1:] - log_BCHQ)
    if masks is not None:
        tail_BCHQ = tail_BCHQ * masks.to_end_BCQ.unsqueeze(2)
    write_BCQHP = xdt_BCQHP * tail_BCHQ.transpose(2, 3).unsqueeze(-1)
    write_BCGQR = write_BCQHP.unflatten(3, (n_groups, heads)).transpose(2, 3).flatten(4)
    write_BCGNR = B_BCGQN.mT @ write_BCGQR

    total_BCH = torch.exp(log_BCHQ[..., -1])
    if masks is not None:
        total_BCH = total_BCH * masks.whole_BC.unsqueeze(2)
    total_BCG1R = total_BCH.repeat_interleave(width, 2).view(batch, n_chunks, n_groups, 1, heads * width)
    state_BGNR = None
    if h_BHPN is not None:
        state_BGNR = h_BHPN.unflatten(1, (n_groups, heads)).permute(0, 1, 4, 2, 3).flatten(3)
    before: list[Tensor] = []
    for write_BGNR, total_BG1R in zip(write_BCGNR.unbind(1), total_BCG1R.unbind(1), strict=True):
        if state_BGNR is None:
            before.append(torch.zeros_like(write_BGNR))
            state_BGNR = write_BGNR
        else:
            before.append(state_BGNR)
            state_BGNR = torch.addcmul(write_BGNR, total_BG1R, state_BGNR)
    assert state_BGNR is not None

    if n_chunks > 1 or h_BHPN is not None:
        head_BCHQ = torch.exp(log_BCHQ)
        if masks is not None:
            head_BCHQ = head_BCHQ * masks.from_start_BCQ.unsqueeze(2)
        read_BCGQR = C_BCGQN @ torch.stack(before, 1)
        read_BCHQP = read_BCGQR.unflatten(4, (heads, width)).transpose(3, 4).flatten(2, 3)
        y_BCHQP = torch.addcmul(y_BCHQP, read_BCHQP, head_BCHQ.unsqueeze(-1))
    y_BLHP = y_BCHQP.transpose(2, 3).flatten(1, 2)[:, :length]
    if D_H is not None:
        y_BLHP = torch.addcmul(y_BLHP, x, D_H.to(dtype).unsqueeze(-1))
    last_BHPN = state_BGNR.view(batch, n_groups, d_state, heads, width).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return y_BLHP, last_BHPN


def _initial(x_BLHP: Tensor, B_BLGN: Tensor, h_init: Tensor | None) -> Tensor:
    batch, _, n_heads, width = x_BLHP.shape
    dtype = accumulator_dtype(x_BLHP.dtype)
    if h_init is None:
        return torch.zeros(batch, n_heads, width, B_BLGN.shape[3], dtype=dtype, device=x_BLHP.device)
    return h_init.to(dtype)
