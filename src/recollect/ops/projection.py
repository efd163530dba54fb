"""One linear map whose output is wanted in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``linear(x, weight).split(sizes, -1)`` with every part contiguous: x (..., D), weight (sum of sizes, D).

    The parts are products of their own: they need not be copied out of one tensor, nor their gradients into one.
    First derivatives only.
    """
    if torch.is_autocast_enabled(x.device.type):
        return tuple(F.linear(x, part) for part in weight.split(list(sizes)))
    return _SplitLinear.apply(x, weight, tuple(sizes))  # pyright: ignore[reportReturnType]


class _SplitLinear(torch.autograd.Function):
    """Gradients of the parts are accumulated in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        x_RD = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_RD, weight)
        ctx.sizes, ctx.shape = sizes, x.shape
        return tuple((x_RD @ part.T).view(*x.shape[:-1], part.shape[0]) for part in weight.split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RD, weight = ctx.saved_tensors
        dx_RD = dweight = None
        rows = [grad.reshape(len(x_RD), -1) for grad in grads]
        if ctx.needs_input_grad[0]:
            for grad, part in zip(rows, weight.split(ctx.sizes), strict=True):
                dx_RD = grad @ part if dx_RD is None else dx_RD.addmm_(grad, part)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            for grad, part in zip(rows, dweight.split(ctx.sizes), strict=True):
                torch.mm(grad.T, x_RD, out=part)
        return None if dx_RD is None else dx_RD.view(ctx.shape), dweight, None
