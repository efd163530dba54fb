"""Diagonal linear recurrence with initial states and resets: h_t = a_t * h_{t-1} + b_t.

The recurrence of every diagonal state-space model (S5, arXiv 2208.04933, eq. 4). A reset at t replaces h_{t-1} by
``h_reset`` before position t is consumed, so h_t = a_t * h_reset + b_t; as an element of the scan this is
(0, b_t + a_t * h_reset), and ``combine`` stays associative.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype recurrent states are summed in: at least float32 (complex64), whatever the compute dtype."""
    return torch.promote_types(dtype, torch.float32)


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The associative operator: element (a, b) stands for h -> a * h + b, and ``first`` is applied first."""
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def elements(a: Tensor, b: Tensor, reset: Tensor | None = None, h_reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scan elements in which resets are already expressed: (0, b + a * h_reset) wherever ``reset`` is true.

    a (N,) or (B, L, N); b (B, L, N); reset (B, L) bool; h_reset (N,) or (B, N), None for zero. Without ``reset`` both
    are returned as they came.
    """
    if reset is None:
        return a, b
    reset_BL1 = reset.unsqueeze(-1)
    if h_reset is not None:
        h_reset = h_reset.unsqueeze(1) if h_reset.dim() == 2 else h_reset
        b = b + torch.where(reset_BL1, a * h_reset, 0)
    return torch.where(reset_BL1, 0, a), b


def scan_reference(
    a: Tensor,
    b: Tensor,
    h_init: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    h_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scan`` one position after the other, as the equation is written."""
    dtype = accumulator_dtype(torch.promote_types(a.dtype, b.dtype))
    a, b = a.to(dtype), b.to(dtype)
    h_BN = b.new_zeros(b.shape[0], b.shape[2]) if h_init is None else h_init.to(dtype)
    fresh_BN = torch.zeros_like(h_BN) if h_reset is None else h_reset.to(dtype).expand_as(h_BN)
    a_steps = a.unbind(1) if a.dim() == 3 else (a,) * b.shape[1]
    reset_steps = (None,) * b.shape[1] if reset is None else reset.unbind(1)
    states = []
    # unbind, because the gradient of every b[:, t] would be a full tensor of zeros: a quadratic backward.
    for a_t, b_t, reset_t in zip(a_steps, b.unbind(1), reset_steps, strict=True):
        if reset_t is not None:
            h_BN = torch.where(reset_t.unsqueeze(-1), fresh_BN, h_BN)
        h_BN = a_t * h_BN + b_t
        states.append(h_BN)
    return torch.stack(states, 1), h_BN


def scan(
    a: Tensor,
    b: Tensor,
    h_init: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    h_reset: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """All states of h_t = a_t * h_{t-1} + b_t, and the last one.

    a (N,) constant in time or (B, L, N); b (B, L, N) with L >= 1; h_init (B, N), None for zero; reset (B, L) bool;
    h_reset (N,) or (B, N), None for zero. Real or complex; computed in at least float32. Returns h (B, L, N) and
    h_last (B, N).

    Time O(B L N), memory O(B L N): the states are all that is kept for backward, which is the same recurrence run
    backward in time. On a CPU compiled loops over time, which read resets as they go; on a GPU ``gpu.scan``, one
    reading of b and one writing of h. Elsewhere, or with ``chunk_size``, PyTorch's operations: ``chunk_size`` positions
    run one after the other, chunks are taken side by side, then joined by their carries. None means L on a CPU, where
    the plain loop moves the least memory, and about sqrt(L) elsewhere, where the number of kernels counts. First
    derivatives only.
    """
    dtype = accumulator_dtype(torch.promote_types(a.dtype, b.dtype))
    if chunk_size is None:
        if a.is_complex() or b.is_complex():
            a, b = a.to(dtype).resolve_conj(), b.to(dtype).resolve_conj()
        module = dispatch.gpu_kernels("scan", as_real(a), as_real(b))
        if module is not None:
            shape = (b.shape[0], b.shape[2])
            h_init = b.new_zeros(shape, dtype=dtype) if h_init is None else h_init.to(dtype).resolve_conj()
            fresh = b.new_zeros(shape[1], dtype=dtype) if h_reset is None else h_reset.to(dtype).resolve_conj()
            return _GpuScan.apply(module, a, b, h_init, fresh, reset)  # pyright: ignore[reportReturnType]
    a, b = a.to(dtype).resolve_conj(), b.to(dtype).resolve_conj()
    h_init = b.new_zeros(b.shape[0], b.shape[2]) if h_init is None else h_init.to(dtype).resolve_conj()
    h_reset = None if h_reset is None else h_reset.to(dtype).resolve_conj()
    if chunk_size is None and dispatch.explain_kernels(as_real(a), as_real(b)).path == "numba":
        fresh = b.new_zeros(b.shape[2]) if h_reset is None else h_reset
        compiled: Tensor = _CompiledScan.apply(a, b, h_init, fresh, reset)  # pyright: ignore[reportAssignmentType]
        return compiled, compiled[:, -1]
    a, b = elements(a, b, reset, h_reset)
    length = b.shape[1]
    if chunk_size is None:
        chunk_size = length if b.device.type == "cpu" else 1 << ((length - 1).bit_length() + 1) // 2
    h_BLN: Tensor = _Scan.apply(a, b, h_init, chunk_size)  # pyright: ignore[reportAssignmentType]
    return h_BLN, h_BLN[:, -1]


def as_real(t: Tensor) -> Tensor:
    """A real view: (..., 2) of a complex tensor, a real one itself."""
    return torch.view_as_real(t) if t.is_complex() else t


class _CompiledScan(torch.autograd.Function):
    """The scan and its adjoint as compiled loops; ``fresh`` (N,) or (B, N) is the state after a reset."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h_init: Tensor, fresh: Tensor, reset: Tensor | None) -> Tensor:
        h = b.clone(memory_format=torch.contiguous_format)
        module = dispatch.kernels("scan", as_real(h))
        assert module is not None
        module.scan_forward(as_real(a), as_real(h), as_real(h_init.contiguous()), reset, as_real(fresh), split=False)
        ctx.save_for_backward(a, h, h_init, fresh, reset)
        return h

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        a, h, h_init, fresh, reset = ctx.saved_tensors
        g = grad_outputs[0].resolve_conj().clone(memory_format=torch.contiguous_format)
        module = dispatch.kernels("scan", as_real(h))
        assert module is not None
        grads: Sequence[Tensor] = module.scan_backward(
            as_real(a), as_real(h), as_real(h_init.contiguous()), reset, as_real(fresh), as_real(g), split=False
        )
        if h.is_complex():
            grads = [torch.view_as_complex(grad) for grad in grads]
        grad_a, grad_init, grad_fresh = grads
        return grad_a, g, grad_init, grad_fresh if fresh.dim() == 2 else grad_fresh.sum(0), None


class _GpuScan(torch.autograd.Function):
    """``gpu.scan``. ``a`` and ``b`` may be in half precision, which the kernels read as it is."""

    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, a: Tensor, b: Tensor, h_init: Tensor, fresh: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h = torch.empty_like(b, dtype=h_init.dtype, memory_format=torch.contiguous_format)
        small = as_real(h_init), reset, as_real(fresh)
        module.scan_forward(as_real(a), as_real(b), *small, split=False, out=as_real(h))
        ctx.save_for_backward(a, h, h_init, fresh, reset)
        ctx.module, ctx.dtype = module, b.dtype
        return h, h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, h, h_init, fresh, reset = ctx.saved_tensors
        g, last = (t.resolve_conj() for t in grad_outputs)
        grad_b = torch.empty_like(h)
        small = as_real(h_init), reset, as_real(fresh)
        grads: Sequence[Tensor] = ctx.module.scan_backward(
            as_real(a), as_real(h), *small, as_real(g), split=False, last=as_real(last), out=as_real(grad_b)
        )
        if h.is_complex():
            grads = [torch.view_as_complex(grad) for grad in grads]
        grad_a, grad_init, grad_fresh = grads
        grad_fresh = grad_fresh if fresh.dim() == 2 else grad_fresh.sum(0)
        return None, grad_a.to(a.dtype), grad_b.to(ctx.dtype), grad_init, grad_fresh, None


class _Scan(torch.autograd.Function):
    """The scan with its adjoint g_t = dh_t + conj(a_{t+1}) g_{t+1}, da_t = g_t conj(h_{t-1}), db_t = g_t."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h_init: Tensor, chunk_size: int) -> Tensor:
        h = _run(a, b, h_init, chunk_size)
        ctx.save_for_backward(a, h, h_init)
        ctx.chunk_size = chunk_size
        return h

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None]:
        a, h, h_init = ctx.saved_tensors
        # The adjoint is run on conj(g), so that a can be read as it lies in memory.
        g = _run_backward(a, torch.conj_physical(grad_outputs[0]), ctx.chunk_size)
        grad_a = None
        if ctx.needs_input_grad[0]:
            first = g[:, 0] * h_init
            if a.dim() == 1:
                grad_a = torch.conj_physical((g[:, 1:] * h[:, :-1]).sum((0, 1)) + first.sum(0))
            else:
                grad_a = torch.empty_like(h)
                grad_a[:, 0] = first
                torch.mul(g[:, 1:], h[:, :-1], out=grad_a[:, 1:])
                grad_a = torch.conj_physical_(grad_a)
        a_first = a if a.dim() == 1 else a[:, 0]
        grad_init = torch.conj_physical(g[:, 0] * a_first)
        return grad_a, torch.conj_physical_(g), grad_init, None


def _run(a: Tensor, b: Tensor, h_init: Tensor, chunk_size: int) -> Tensor:
    if chunk_size < b.shape[1]:
        return _run_chunked(a, b, h_init, chunk_size)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    _recur(_steps(a, b.shape[1]), b.unbind(1), h.unbind(1), h_init)
    return h


def _run_backward(a: Tensor, g: Tensor, chunk_size: int) -> Tensor:
    """g_t = g_t + a_{t+1} g_{t+1}; the plain loop works in place on ``g``."""
    length = g.shape[1]
    if chunk_size < length:
        shifted = a if a.dim() == 1 else torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:].flip(1)], 1)
        return _run_chunked(shifted, g.flip(1), torch.zeros_like(g[:, 0]), chunk_size).flip(1)
    steps = g.unbind(1)[::-1]
    _recur(_steps(a, length)[:0:-1], steps[1:], steps[1:], steps[0])
    return g


def _run_chunked(a: Tensor, b: Tensor, h_init: Tensor, chunk_size: int) -> Tensor:
    """Two levels: states of all chunks from zero, side by side; then the carries; then h += (product of a) * carry."""
    batch, length, width = b.shape
    n_chunks = length // chunk_size
    whole = n_chunks * chunk_size
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    b_BCQN = b[:, :whole].unflatten(1, (n_chunks, chunk_size))
    h_BCQN = h[:, :whole].unflatten(1, (n_chunks, chunk_size))
    h_steps = h_BCQN.unbind(2)
    if a.dim() == 1:
        a_steps: Sequence[Tensor] = (a,) * chunk_size
        product = a.expand(chunk_size, width).cumprod(0)
    else:
        a_BCQN = a[:, :whole].unflatten(1, (n_chunks, chunk_size))
        a_steps = a_BCQN.unbind(2)
        product = a_BCQN.cumprod(2)
    h_steps[0].copy_(b_BCQN[:, :, 0])
    _recur(a_steps[1:], b_BCQN.unbind(2)[1:], h_steps[1:], h_steps[0])
    carry_BCN = torch.empty_like(h_BCQN[:, :, 0])
    decay_steps = _steps(product[..., -1, :], n_chunks)
    carries = carry_BCN.unbind(1)
    carries[0].copy_(h_init)
    _recur(decay_steps[:-1], h_steps[-1].unbind(1)[:-1], carries[1:], carries[0])
    h_BCQN.addcmul_(product, carry_BCN.unsqueeze(2))
    tail = slice(whole, length)
    if whole < length:
        a_tail = a if a.dim() == 1 else a[:, tail]
        _recur(_steps(a_tail, length - whole), b[:, tail].unbind(1), h[:, tail].unbind(1), h[:, whole - 1])
    return h.view(batch, length, width)


def _recur(a_steps: Sequence[Tensor], b_steps: Sequence[Tensor], out_steps: Sequence[Tensor], h: Tensor) -> None:
    """Write out_t = a_t * out_{t-1} + b_t from ``h``; ``out_steps`` may be ``b_steps``."""
    for a_t, b_t, out_t in zip(a_steps, b_steps, out_steps, strict=True):
        torch.addcmul(b_t, a_t, h, out=out_t)
        h = out_t


def _steps(a: Tensor, length: int) -> Sequence[Tensor]:
    return (a,) * length if a.dim() == 1 else a.unbind(1)
