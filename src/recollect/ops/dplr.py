"""Diagonal plus low rank, discretised: the system that ``ops.s4_kernel`` runs, and its compiled loop.

h' = (Lambda - p p^*) h + B u, y = 2 Re(C h), by the bilinear rule at step dt (S4, arXiv 2111.00396, section 3). States
come in conjugate pairs of which one is kept, so p^* h over all states is 2 Re(p^* h) over the kept ones, and A acts
linearly over the reals only. With d = 1 / (1 - dt/2 Lambda), Woodbury's identity gives the step in O(N):

h_t = e h_{t-1} - w s + b u_t,  s = 2 Re(v . h_{t-1}),  e = 2 d - 1,  v = conj(p) d,  w = dt d p / (1 + dt Re(p^* d p))

and b = dt (I - dt/2 A)^{-1} B likewise. No step lengthens a state: A + A^* is negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.lanes import from_lanes, to_lanes


class Discrete(NamedTuple):
    """The discretised system, complex (D, P): see the module. y = 2 Re(c . h)."""

    e: Tensor
    v: Tensor
    w: Tensor
    b: Tensor
    c: Tensor


def discretise(values_DP: Tensor, p_DP: Tensor, B_DP: Tensor, C_DP: Tensor, dt_D: Tensor) -> Discrete:
    """Bilinear, for values (D, P) with negative real part."""
    half_D1 = dt_D.unsqueeze(-1) / 2
    d = 1 / (1 - half_D1 * values_DP)
    v = p_DP.conj() * d
    dp = d * p_DP
    scale_D1 = 1 / (1 + 2 * half_D1 * (p_DP.conj() * dp).sum(-1, keepdim=True).real)
    dB = d * B_DP
    b = dB - dp * (half_D1 * scale_D1 * 2 * (v * B_DP).sum(-1, keepdim=True).real)
    return Discrete(2 * d - 1, v, 2 * half_D1 * scale_D1 * dp, 2 * half_D1 * b, C_DP)


def cast(system: Discrete, dtype: torch.dtype) -> Discrete:
    """The same numbers in another complex dtype."""
    return Discrete(*(t.to(dtype) for t in system))


def compiled_s4(
    u_BLD: Tensor, system: Discrete, skip_D: Tensor, h_init: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``s4`` by numba: y (B, L, D) and the last state (B, D, P, 2)."""
    read = [torch.view_as_real((2 * t).conj().resolve_conj()) for t in (system.c, system.v)]
    parts_DPK = torch.cat([*(torch.view_as_real(t) for t in (system.e, system.w, system.b)), *read], -1)
    out: tuple[Tensor, Tensor] = _Compiled.apply(u_BLD, parts_DPK, skip_D, h_init, reset)  # pyright: ignore[reportAssignmentType]
    return out


class _Compiled(torch.autograd.Function):
    """The numba kernels; between them only every 32nd state is kept."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, parts: Tensor, skip: Tensor, start: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kernels = dispatch.kernels("dplr_ssm", u)
        assert kernels is not None
        u, lanes = u.contiguous(), kernels.LANES
        batch, length, _ = u.shape
        resets = u.new_zeros(batch, 0, dtype=torch.bool) if reset is None else reset
        system, starts = to_lanes(parts, lanes), to_lanes(start, lanes)
        skips = to_lanes(skip[:, None, None], lanes)[:, 0, 0]
        n_blocks, n_pairs = system.shape[:2]
        n_kept = -(-length // kernels.STRETCH) if any(ctx.needs_input_grad) else 0
        kept = u.new_empty(batch, n_blocks, n_kept, n_pairs, 2 * lanes)
        y, last = torch.empty_like(u), torch.empty_like(starts)
        kernels.run_forward(n_blocks, u, resets, system, skips, starts, y, last, kept)
        ctx.kernels = kernels
        ctx.save_for_backward(u, resets, system, skips, kept)
        return y, from_lanes(last, u.shape[2])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        u, resets, system, skips, kept = ctx.saved_tensors
        batch, width = u.shape[0], u.shape[2]
        end = to_lanes(grad_outputs[1], ctx.kernels.LANES)
        du, dsystem = torch.empty_like(u), system.new_empty(batch, *system.shape)
        dskip, dstart = skips.new_empty(batch, *skips.shape), torch.empty_like(end)
        given = (u, grad_outputs[0], resets, system, skips, kept, end, du, dsystem, dskip, dstart)
        ctx.kernels.run_backward(system.shape[0], *given)
        return du, from_lanes(dsystem.sum(0), width), dskip.sum(0).flatten()[:width], from_lanes(dstart, width), None
