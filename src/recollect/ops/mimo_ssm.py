"""A multi-input, multi-output diagonal state-space model over real numbers (S5, arXiv 2208.04933, section 3).

h_t = a * h_{t-1} + B u_t,  y_t = 2 Re(C h_t) + D u_t

One state of every conjugate pair is kept, as its real and then its imaginary part: N pairs are 2N reals side by side,
so reading and writing are each one real matrix product and no complex number is formed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.scan import accumulator_dtype, scan


def mimo_ssm_step(
    u_BD: Tensor, a_2N: Tensor, inward_RD: Tensor, outward_DR: Tensor, skip_D: Tensor, h_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of ``mimo_ssm``: y (B, D) and the next state (B, 2N). O(B D N)."""
    dtype = h_BR.dtype
    with torch.autocast(u_BD.device.type, enabled=False):
        u, skip = u_BD.to(dtype), skip_D.to(dtype)
        (a_re, a_im), (re, im) = a_2N.to(dtype), h_BR.chunk(2, -1)
        turned_BR = torch.cat([a_re * re - a_im * im, a_re * im + a_im * re], -1)
        h_BR = turned_BR + F.linear(u, inward_RD.to(dtype))
        y_BD = F.linear(h_BR, outward_DR.to(dtype)) + skip * u
    return y_BD.to(u_BD.dtype), h_BR


def mimo_ssm_reference(
    u_BLD: Tensor,
    a_2N: Tensor,
    inward_RD: Tensor,
    outward_DR: Tensor,
    skip_D: Tensor,
    h_init: Tensor,
    *,
    reset: Tensor | None = None,
    h_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``mimo_ssm`` one position after the other, as the equation is written."""
    h_BR = h_init.to(accumulator_dtype(u_BLD.dtype))
    fresh_BR = torch.zeros_like(h_BR) if h_reset is None else h_reset.to(h_BR.dtype).expand_as(h_BR)
    resets = (None,) * u_BLD.shape[1] if reset is None else reset.unbind(1)
    outputs = []
    for u_BD, reset_B in zip(u_BLD.unbind(1), resets, strict=True):
        if reset_B is not None:
            h_BR = torch.where(reset_B.unsqueeze(-1), fresh_BR, h_BR)
        y_BD, h_BR = mimo_ssm_step(u_BD, a_2N, inward_RD, outward_DR, skip_D, h_BR)
        outputs.append(y_BD)
    return torch.stack(outputs, 1), h_BR


def mimo_ssm(
    u_BLD: Tensor,
    a_2N: Tensor,
    inward_RD: Tensor,
    outward_DR: Tensor,
    skip_D: Tensor,
    h_init: Tensor,
    *,
    reset: Tensor | None = None,
    h_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, D) in the dtype of u, and the last state (B, 2N) in at least float32.

    u (B, L, D) with L >= 1; a (2, N) real and imaginary parts; inward (2N, D): rows Re B, then Im B; outward (D, 2N):
    columns 2 Re C, then -2 Im C; skip (D,); h_init (B, 2N); reset (B, L) bool; h_reset (2N,), None for zero.

    Time O(B L D N) in two matrix products, three times that with backward; memory: the states, B L 2N reals. Kernels,
    compiled loops on a CPU and ``gpu.scan`` on a GPU, write the states over B u. First derivatives only.
    """
    dtype = accumulator_dtype(torch.promote_types(u_BLD.dtype, h_init.dtype))
    u = u_BLD.to(dtype)
    a, inward, outward, skip, h_init = (t.to(dtype) for t in (a_2N, inward_RD, outward_DR, skip_D, h_init))
    fresh = h_init.new_zeros(h_init.shape[1]) if h_reset is None else h_reset.to(dtype)
    # Mixed-precision autocast would take the products in half precision.
    with torch.autocast(u.device.type, enabled=False):
        module = dispatch.kernels("scan", u, a) or dispatch.gpu_kernels("scan", u, a)
        if module is not None:
            y_BLD, h_BR = _Fused.apply(module, u, a, inward, outward, skip, h_init, fresh, reset)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            drive_BLR = F.linear(u, inward)
            h_BLN, h_BN = scan(
                _pairs(a.flatten()), _pairs(drive_BLR), _pairs(h_init), reset=reset, h_reset=_pairs(fresh)
            )
            y_BLD = torch.addcmul(F.linear(_side_by_side(h_BLN), outward), u, skip)
            h_BR = _side_by_side(h_BN)
    return y_BLD.to(u_BLD.dtype), h_BR


def _pairs(t: Tensor) -> Tensor:
    return torch.complex(*t.chunk(2, -1))


def _side_by_side(t: Tensor) -> Tensor:
    return torch.cat([t.real, t.imag], -1)


class _Fused(torch.autograd.Function):
    """Both products and the scan between them, which runs in place: forward over B u, backward over dy C."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        u_BLD: Tensor,
        a_2N: Tensor,
        inward_RD: Tensor,
        outward_DR: Tensor,
        skip_D: Tensor,
        h_init: Tensor,
        fresh: Tensor,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u = u_BLD.contiguous()
        h = F.linear(u, inward_RD)
        parts = (2, a_2N.shape[1])
        module.scan_forward(
            a_2N, h.unflatten(-1, parts), h_init.unflatten(-1, parts), reset, fresh.view(parts), split=True
        )
        y = u * skip_D
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), outward_DR.t())
        ctx.save_for_backward(u, a_2N, inward_RD, outward_DR, skip_D, h_init, fresh, reset, h)
        ctx.module = module
        return y, h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        u, a_2N, inward_RD, outward_DR, skip_D, h_init, fresh, reset, h = ctx.saved_tensors
        dy, dlast = grad_outputs[0].contiguous(), grad_outputs[1]
        parts = (2, a_2N.shape[1])
        dy_RD, u_RD, h_RR = (t.view(-1, t.shape[-1]) for t in (dy, u, h))
        dskip = (dy_RD * u_RD).sum(0)
        doutward = dy_RD.t() @ h_RR
        g = dy @ outward_DR
        g[:, -1] += dlast
        grad_a, grad_init, grad_fresh = ctx.module.scan_backward(
            a_2N,
            h.unflatten(-1, parts),
            h_init.unflatten(-1, parts),
            reset,
            fresh.view(parts),
            g.unflatten(-1, parts),
            split=True,
        )
        g_RR = g.view(-1, g.shape[-1])
        dinward = g_RR.t() @ u_RD
        du = None
        if ctx.needs_input_grad[1]:
            du = dy * skip_D
            du.view(-1, du.shape[-1]).addmm_(g_RR, inward_RD)
        return None, du, grad_a, dinward, doutward, dskip, grad_init.flatten(1), grad_fresh.flatten(1).sum(0), None
