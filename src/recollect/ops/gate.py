"""SiLU gates of the Mamba layers: y * SiLU(z), and the norm that Mamba-2 (arXiv 2405.21060) takes after it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch


def gated(y: Tensor, z: Tensor) -> Tensor:
    """y * SiLU(z) for y, z (..., E). Backward keeps y and z only in the compiled form, which takes half precision in
    float32.
    """
    found = dispatch.kernels_in_float32("gate", y, z, bits=2)
    if found is None:
        return y * F.silu(z)
    out: Tensor = _Gate.apply(found[0], *found[1])  # pyright: ignore[reportAssignmentType]
    return out.to(torch.promote_types(y.dtype, z.dtype))


def gated_rms_norm(y: Tensor, z: Tensor, weight_E: Tensor, *, n_groups: int = 1, eps: float = 1e-5) -> Tensor:
    """weight * v / sqrt(mean(v^2) + eps) with v = y * SiLU(z) (..., E), the mean over each of ``n_groups`` equal parts
    of E. In at least float32; the result has the dtype of ``z``.
    """
    found = dispatch.kernels_in_float32("gate", y, z, weight_E, bits=2)
    if found is None:
        dtype = torch.promote_types(y.dtype, torch.float32)
        v = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (n_groups, -1))
        return (weight_E * F.rms_norm(v, v.shape[-1:], eps=eps).flatten(-2)).to(z.dtype)
    out: Tensor = _Norm.apply(found[0], *found[1], n_groups, eps)  # pyright: ignore[reportAssignmentType]
    return out.to(z.dtype)


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [t.reshape(-1, t.shape[-1]).contiguous() for t in tensors]


class _Gate(torch.autograd.Function):
    """``ops.kernels.gate`` without the norm."""

    @staticmethod
    def forward(ctx: Any, module: ModuleType, y: Tensor, z: Tensor) -> Tensor:
        y_RE, z_RE = _rows(y, z)
        out = torch.empty_like(y_RE, dtype=torch.promote_types(y.dtype, z.dtype))
        arrays = module.arrays(y_RE, z_RE, out)
        module.over_rows(-(-len(out) // module.SPAN), lambda b, e: module.gate_forward(b, e, *arrays))
        ctx.save_for_backward(y_RE, z_RE)
        ctx.module, ctx.shape = module, y.shape
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, z = ctx.saved_tensors
        dy, dz = torch.empty_like(y), torch.empty_like(z)
        arrays = ctx.module.arrays(y, z, *_rows(grad_outputs[0]), dy, dz)
        ctx.module.over_rows(-(-len(y) // ctx.module.SPAN), lambda b, e: ctx.module.gate_backward(b, e, *arrays))
        return None, dy.view(ctx.shape), dz.view(ctx.shape)


class _Norm(torch.autograd.Function):
    """``ops.kernels.gate`` with the norm."""

    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float
    ) -> Tensor:
        y_RE, z_RE = _rows(y, z)
        out = torch.empty_like(z_RE)
        arrays = module.arrays(y_RE, z_RE, weight, out)
        units = -(-len(out) // module.SPAN)
        module.over_rows(units, lambda b, e: module.norm_forward(b, e, n_groups, eps, *arrays))
        ctx.save_for_backward(y_RE, z_RE, weight)
        ctx.module, ctx.shape, ctx.options = module, y.shape, (n_groups, eps)
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        module, options = ctx.module, ctx.options
        y, z, weight = ctx.saved_tensors
        dy, dz = torch.empty_like(y), torch.empty_like(z)
        units = -(-len(y) // module.SPAN)
        dweight = y.new_zeros(units, y.shape[1])
        arrays = module.arrays(y, z, weight, *_rows(grad_outputs[0]), dy, dz, dweight)
        module.over_rows(units, lambda b, e: module.norm_backward(b, e, *options, *arrays))
        return None, dy.view(ctx.shape), dz.view(ctx.shape), dweight.sum(0), None, None
