"""The selective scan of Mamba (arXiv 2312.00752, section 3): a diagonal recurrence whose step, input and output vary.

h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = h_t C_t + D u_t  (per channel, h of size N)

A reset at t empties the state before position t is consumed. Sums are taken in at least float32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from recollect.ops import dispatch
from recollect.ops.scan import accumulator_dtype, scan

CHUNK = 64
"""Positions whose states the PyTorch form holds at a time."""


def selective_step(
    u_BE: Tensor,
    dt_BE: Tensor,
    A_EN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_E: Tensor | None,
    h_BEN: Tensor,
    *,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One position of ``selective_scan``: y (B, E) and the next state (B, E, N). O(B E N)."""
    dtype = h_BEN.dtype
    u_BE, dt_BE = u_BE.to(dtype), dt_BE.to(dtype)
    dt_BE = F.softplus(dt_BE) if softplus else dt_BE
    write_BEN = (dt_BE * u_BE).unsqueeze(-1) * B_BN.to(dtype).unsqueeze(1)
    h_BEN = torch.exp(dt_BE.unsqueeze(-1) * A_EN.to(dtype)) * h_BEN + write_BEN
    y_BE = (h_BEN * C_BN.to(dtype).unsqueeze(1)).sum(-1)
    return (y_BE if D_E is None else y_BE + D_E.to(dtype) * u_BE), h_BEN


def selective_scan_reference(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` one position after the other, as the equation is written."""
    dtype = accumulator_dtype(u_BLE.dtype)
    h_BEN = u_BLE.new_zeros(u_BLE.shape[0], *A_EN.shape, dtype=dtype) if h_init is None else h_init.to(dtype)
    reset_steps = (None,) * u_BLE.shape[1] if reset is None else reset.unbind(1)
    steps = zip(u_BLE.unbind(1), dt_BLE.unbind(1), B_BLN.unbind(1), C_BLN.unbind(1), reset_steps, strict=True)
    outputs = []
    for u_BE, dt_BE, B_BN, C_BN, reset_B in steps:
        if reset_B is not None:
            h_BEN = h_BEN.masked_fill(reset_B[:, None, None], 0)
        y_BE, h_BEN = selective_step(u_BE, dt_BE, A_EN, B_BN, C_BN, D_E, h_BEN, softplus=softplus)
        outputs.append(y_BE)
    return torch.stack(outputs, 1), h_BEN


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    *,
    h_init: Tensor | None = None,
    reset: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, E) and the last state (B, E, N).

    u, dt (B, L, E); A (E, N) negative; B, C (B, L, N), shared by the channels; D (E,) skip; h_init (B, E, N), None for
    zero; reset (B, L) bool. ``dt`` must be positive, unless ``softplus`` is to make it so. Any L >= 1.

    Time O(B L E N), sequential in time. The states (B, L, E, N) are never held: backward makes them again from states
    stored every 32 (compiled kernel, ``ops.dispatch``) or 64 positions. On a GPU an installed library is used where
    there are neither resets nor ``h_init`` (``ops.libraries``). First derivatives only.
    """
    with torch.autocast(u_BLE.device.type, enabled=False):
        dtype = accumulator_dtype(u_BLE.dtype)
        given = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E)
        asked = dispatch.Asked(
            u_BLE.device,
            u_BLE.dtype,
            *u_BLE.shape[:2],
            heads=1,
            width=u_BLE.shape[2],
            d_state=A_EN.shape[1],
            reset=reset is not None,
            h_init=h_init is not None,
            gradients=dispatch.asks_gradients(*given, h_init),
        )
        library = dispatch.explain_library("selective_scan", asked).path
        if library != "torch":
            from recollect.ops import libraries

            return libraries.selective_scan(library, *given, softplus)  # pyright: ignore[reportCallIssue] its decorator
        u, dt, A, B, C = (t.to(dtype) for t in (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN))
        D = A.new_zeros(A.shape[0]) if D_E is None else D_E.to(dtype)
        h = u.new_zeros(u.shape[0], *A.shape) if h_init is None else h_init.to(dtype)
        module = dispatch.kernels("selective_scan", u, dt, A, B, C)
        if module is None:
            return _chunked(u, F.softplus(dt) if softplus else dt, A, B, C, D, h, reset)
        return _Fused.apply(module, u, dt, A, B, C, D, h, reset, softplus)  # pyright: ignore[reportReturnType]


def _chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The diagonal scan over E x N channels, one chunk of states at a time, made again in backward."""
    outputs: list[Tensor] = []
    resets = (None,) * -(-u.shape[1] // CHUNK) if reset is None else reset.split(CHUNK, 1)
    parts = zip(*(t.split(CHUNK, 1) for t in (u, dt, B, C)), resets, strict=True)
    for u_part, dt_part, B_part, C_part, reset_part in parts:
        given = (u_part, dt_part, B_part, C_part, reset_part, A, h)
        if torch.is_grad_enabled():
            y, h = cast(
                tuple[Tensor, Tensor], checkpoint(_chunk, *given, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            y, h = _chunk(*given)
        outputs.append(y)
    return torch.addcmul(torch.cat(outputs, 1), u, D), h


def _chunk(
    u_BQE: Tensor, dt_BQE: Tensor, B_BQN: Tensor, C_BQN: Tensor, reset: Tensor | None, A_EN: Tensor, h_BEN: Tensor
) -> tuple[Tensor, Tensor]:
    decay_BQEN = torch.exp(dt_BQE.unsqueeze(-1) * A_EN)
    write_BQEN = (dt_BQE * u_BQE).unsqueeze(-1) * B_BQN.unsqueeze(2)
    states, last = scan(decay_BQEN.flatten(2), write_BQEN.flatten(2), h_BEN.flatten(1), reset=reset)
    y_BQE = (states.view_as(write_BQEN) @ C_BQN.unsqueeze(-1)).squeeze(-1)
    return y_BQE, last.view_as(h_BEN)


class _Fused(torch.autograd.Function):
    """``ops.kernels.selective_scan``."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        h: Tensor,
        reset: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = u.shape
        # Shares of the channels give few rows of a batch something to do on every thread; they depend on sizes only.
        shares = min(-(-channels // module.BLOCK), -(-8 // batch))
        given = [t.contiguous() for t in (u, dt, A.T, B, C, D)]
        given.append(torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous())
        state = h.mT.clone(memory_format=torch.contiguous_format)
        n_kept = -(-length // module.SPAN) if any(ctx.needs_input_grad) else 0
        kept = u.new_empty(batch, n_kept, A.shape[1], channels)
        y = torch.empty_like(given[0])
        arrays = module.arrays(*given, state, y, kept)
        module.over_rows(batch * shares, lambda b, e: module.forward(b, e, shares, softplus, *arrays))
        ctx.save_for_backward(*given, kept)
        ctx.module, ctx.options = module, (shares, softplus)
        return y, state.mT

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor | None, ...]:
        module, (shares, softplus) = ctx.module, ctx.options
        u, dt, A, B, C, D, reset, kept = ctx.saved_tensors
        dstate = dlast.mT.clone(memory_format=torch.contiguous_format)
        du, ddt = torch.empty_like(u), torch.empty_like(dt)
        dA, dD = torch.zeros_like(dstate), u.new_zeros(u.shape[0], u.shape[2])
        dB, dC = (t.new_zeros(shares, *t.shape) for t in (B, C))
        arrays = module.arrays(u, dt, A, B, C, D, reset, kept, dy.contiguous(), dstate, du, ddt, dA, dB, dC, dD)
        rows = u.shape[0] * shares
        module.over_rows(rows, lambda b, e: module.backward(b, e, shares, softplus, *arrays))
        return None, du, ddt, dA.sum(0).T, dB.sum(0), dC.sum(0), dD.sum(0), dstate.mT, None, None
