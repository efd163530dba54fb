"""Diagonal state-space models with one input and one output per channel, the core of S4D and DSS.

h_t = a h_{t-1} + u_t,  y_t = Re(c . h_t) + skip u_t,  with P complex states per channel (arXiv 2206.11893, eq. 2)

The input enters every state with weight 1: a discretised B only ever appears in a product with c, and is put there.
A reset at t empties the state before position t is consumed. Sums are taken in at least float32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.chunking import any_reset, chunk_size_for
from recollect.ops.lanes import from_lanes, to_lanes
from recollect.ops.lti import Basis, chunked_ssm
from recollect.ops.scan import accumulator_dtype


def siso_ssm_step(u_BD: Tensor, a_DP: Tensor, c_DP: Tensor, skip_D: Tensor, h_BDP: Tensor) -> tuple[Tensor, Tensor]:
    """One position: y (B, D) and the next state, complex (B, D, P). O(B D P)."""
    h_BDP = a_DP * h_BDP + u_BD.unsqueeze(-1).to(h_BDP.real.dtype)
    return (c_DP * h_BDP).sum(-1).real + skip_D * u_BD, h_BDP


def siso_ssm_reference(
    u_BLD: Tensor, a_DP: Tensor, c_DP: Tensor, skip_D: Tensor, h_init: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``siso_ssm`` one position after the other, as the equation is written."""
    h_BDP = torch.view_as_complex(h_init)
    outputs: list[Tensor] = []
    reset_steps = (None,) * u_BLD.shape[1] if reset is None else reset.unbind(1)
    for u_BD, reset_B in zip(u_BLD.unbind(1), reset_steps, strict=True):
        if reset_B is not None:
            h_BDP = h_BDP.masked_fill(reset_B[:, None, None], 0)
        y_BD, h_BDP = siso_ssm_step(u_BD, a_DP, c_DP, skip_D, h_BDP)
        outputs.append(y_BD)
    return torch.stack(outputs, 1), torch.view_as_real(h_BDP)


def siso_ssm(
    u_BLD: Tensor,
    a_DP: Tensor,
    c_DP: Tensor,
    skip_D: Tensor,
    h_init: Tensor,
    *,
    reset: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, D) and the last state (B, D, P, 2), parallel over time.

    u (B, L, D) real; a, c (D, P) complex with |a| <= 1; skip (D,); h_init (B, D, P, 2), real and imaginary parts; reset
    (B, L) bool. Any L >= 1. First derivatives only.

    On a CPU a compiled loop over the positions keeps the states of 64 channels in the nearest caches: time O(B L D P),
    memory O(B L D), and backward needs no states. On a GPU ``gpu.siso_ssm`` does so in registers, and reads u in half
    precision as it is. Elsewhere ``ops.lti`` in chunks of ``chunk_size``.
    """
    dtype = accumulator_dtype(u_BLD.dtype)
    h_init, skip_D = h_init.to(dtype), skip_D.to(dtype)
    a_DP, c_DP = a_DP.to(dtype.to_complex()), c_DP.to(dtype.to_complex())
    out: tuple[Tensor, Tensor]
    gpu = dispatch.gpu_kernels("siso_ssm", u_BLD)
    if gpu is not None:
        a_DP2, c_DP2 = (torch.view_as_real(t.resolve_conj()) for t in (a_DP, c_DP))
        out = _OnGpu.apply(gpu, u_BLD, a_DP2, c_DP2, skip_D, h_init, reset)  # pyright: ignore[reportAssignmentType]
        return out
    u_BLD = u_BLD.to(dtype)
    if dispatch.kernels("siso_ssm", u_BLD, h_init, skip_D) is not None:
        a_DP2, k_DP2 = torch.view_as_real(a_DP), torch.view_as_real(c_DP.conj().resolve_conj())
        out = _Compiled.apply(u_BLD, a_DP2, k_DP2, skip_D, h_init, reset)  # pyright: ignore[reportAssignmentType]
        return out
    with torch.autocast(u_BLD.device.type, enabled=False):
        reset = any_reset(reset)
        batch, length, _ = u_BLD.shape
        if reset is not None:
            chunk_size = chunk_size_for(chunk_size, length, 2 * a_DP.shape[1], batch, int(reset.sum()))
        basis = DiagonalBasis(a_DP, c_DP, min(chunk_size, length))
        y_BLD, h_DBN = chunked_ssm(u_BLD, basis, h_init.flatten(2).transpose(0, 1), reset=reset)
        return torch.addcmul(y_BLD, skip_D, u_BLD), h_DBN.transpose(0, 1).unflatten(2, (-1, 2))


class DiagonalBasis(Basis):
    """The matrices of chunks of ``size`` for a and c (D, P); powers are taken in float64 and rounded once."""

    def __init__(self, a_DP: Tensor, c_DP: Tensor, size: int) -> None:
        dtype = a_DP.dtype
        powers = a_DP.to(torch.complex128).unsqueeze(1)
        while powers.shape[1] < size:
            powers = torch.cat([powers, powers * powers[:, -1:]], 1)
        self.powers_DQP = powers[:, :size].to(dtype)
        before_DQP = torch.cat([torch.ones_like(self.powers_DQP[:, :1]), self.powers_DQP[:, :-1]], 1)
        reads_DQP = (c_DP.unsqueeze(1) * self.powers_DQP).conj().resolve_conj()
        self.writes = torch.view_as_real(before_DQP).flatten(2)
        self.reads = torch.view_as_real(reads_DQP).flatten(2).mT
        weights_DN = torch.view_as_real(c_DP.conj().resolve_conj()).flatten(1)
        self.taps = (self.writes @ weights_DN.unsqueeze(-1)).squeeze(-1)

    @property
    def power(self) -> Tensor:
        return self.powers_DQP[:, -1]

    def advance(self, h_DBN: Tensor, n: int) -> Tensor:
        h_DBP = torch.view_as_complex(h_DBN.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(h_DBP * self.powers_DQP[:, n - 1].unsqueeze(1)).flatten(2)


class _OnGpu(torch.autograd.Function):
    """``ops.gpu.siso_ssm``. ``u`` may be in half precision, which the kernels read as it is."""

    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, u: Tensor, a: Tensor, c: Tensor, skip: Tensor, start: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, starts = module.forward(u, a, c, skip, start, reset)
        ctx.save_for_backward(u, a, c, skip, starts, reset)
        ctx.module = module
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.module.backward(*ctx.saved_tensors, *grad_outputs), None


class _Compiled(torch.autograd.Function):
    """The numba kernels: parameters and states go in with channels last, in blocks of lanes."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, a: Tensor, k: Tensor, skip: Tensor, start: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kernels = dispatch.kernels("siso_ssm", u)
        assert kernels is not None
        u = u.contiguous()
        lanes = kernels.LANES
        resets = u.new_zeros(u.shape[0], 0, dtype=torch.bool) if reset is None else reset
        system = to_lanes(torch.cat([a, k], -1), lanes)
        skips = to_lanes(skip[:, None, None], lanes)[:, 0, 0]
        starts = to_lanes(start, lanes)
        y, last = torch.empty_like(u), torch.empty_like(starts)
        kernels.run_forward(system.shape[0], u, resets, system, skips, starts, y, last)
        ctx.kernels = kernels
        ctx.save_for_backward(u, resets, system, skips, starts)
        ctx.set_materialize_grads(False)
        return y, from_lanes(last, u.shape[2])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        u, resets, system, skips, starts = ctx.saved_tensors
        dy, dlast = grad_outputs
        total: list[Tensor] | None = None
        if dy is not None:
            total = _adjoint(ctx.kernels, u, dy, resets, system, skips, starts, torch.zeros_like(starts))
        if dlast is not None:
            # The adjoint of the last state obeys the same recurrence from another end: reads of weight 1 and no dy.
            plain = system.clone()
            plain[:, :, 2], plain[:, :, 3] = 1, 0
            end = to_lanes(dlast, starts.shape[-1])
            found = _adjoint(ctx.kernels, u, torch.zeros_like(u), resets, plain, torch.zeros_like(skips), starts, end)
            found[1][..., 2:, :] = 0
            total = found if total is None else [one + other for one, other in zip(total, found, strict=True)]
        if total is None:
            return None, None, None, None, None, None
        du, dsystem, dskip, dstart = total
        width = u.shape[2]
        parts = from_lanes(dsystem, width).sum(0)
        return du, parts[..., :2], parts[..., 2:], dskip.sum(0).flatten()[:width], from_lanes(dstart, width), None


def _adjoint(
    kernels: ModuleType,
    u: Tensor,
    dy: Tensor,
    resets: Tensor,
    system: Tensor,
    skips: Tensor,
    starts: Tensor,
    end: Tensor,
) -> list[Tensor]:
    batch = u.shape[0]
    found = [torch.empty_like(u), system.new_empty(batch, *system.shape), skips.new_empty(batch, *skips.shape)]
    found.append(torch.empty_like(starts))
    kernels.run_backward(system.shape[0], u, dy, resets, system, skips, starts, end, *found)
    return found
