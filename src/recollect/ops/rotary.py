"""Rotary position encoding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x_BLHN: Tensor, position_BL: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate each pair (x_m, x_{m+N/2}) by the angle position * base^(-2m/N), so that q . k depends on distance only.

    N is even. Time and memory O(B L H N); angles are taken in float64. First derivatives only.
    """
    half = x_BLHN.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x_BLHN.device, dtype=torch.float64) / half)
    angle = position_BL[:, :, None, None].to(torch.float64) * frequency
    return _Rotate.apply(x_BLHN, angle.cos().to(x_BLHN.dtype), angle.sin().to(x_BLHN.dtype))  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back, so only the angles are kept, which all heads share."""

    @staticmethod
    def forward(ctx: Any, x_BLHN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BLHN, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_outputs[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    if torch.compiler.is_compiling():  # a compiler joins these itself, and cannot write into views
        first, second = x.split(half, -1)
        return torch.cat([first * cos - sign * second * sin, second * cos + sign * first * sin], -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.split(half, -1), out.split(half, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out
