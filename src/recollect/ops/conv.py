"""Short causal depthwise convolution with a carried window and resets."""

from __future__ import annotations

from functools import reduce
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch


def causal_conv(
    x_BLE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    window_BWE: Tensor,
    *,
    reset: Tensor | None = None,
    silu: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] x_{t-j} for lags j < W, and the window to carry on with.

    ``window`` (B, W-1, E) holds the inputs before the first position, oldest first, zero where there were none. A reset
    (B, L) at t makes every tap that reaches back across t zero, in the returned window too. ``silu`` gives
    y * sigmoid(y) instead of y. One position is L = 1. Time O(B L E W); of the kernels, compiled on a CPU and
    ``gpu.conv`` on a GPU, backward needs nothing but x. Half precision is summed in float32 there, and
    ``wide`` lets y be left in that where rounding would cost a pass of its own. First derivatives only.
    """
    taps = weight_EW.shape[1]
    y_BLE: Tensor
    given = [x_BLE, window_BWE, weight_EW, *([] if bias_E is None else [bias_E])]
    gpu = dispatch.gpu_kernels("conv", *given)
    if gpu is not None:
        y_BLE = _OnGpu.apply(gpu, x_BLE, weight_EW, bias_E, window_BWE, reset, silu)  # pyright: ignore[reportAssignmentType]
        return y_BLE, _next_window(x_BLE, window_BWE, reset) if taps > 1 else window_BWE
    found = dispatch.kernels_in_float32("conv", *given, bits=2)
    if found is None:
        y_BLE = _shifted_products(x_BLE, weight_EW, bias_E, window_BWE, reset)
        y_BLE = F.silu(y_BLE) if silu else y_BLE
    else:
        module, (x, window, weight, *biases) = found
        bias = biases[0] if biases else weight.new_zeros(weight.shape[0])
        y_BLE = _Fused.apply(module, x, weight, bias, window, reset, silu)  # pyright: ignore[reportAssignmentType]
        y_BLE = y_BLE if wide else y_BLE.to(reduce(torch.promote_types, (t.dtype for t in given)))
    return y_BLE, _next_window(x_BLE, window_BWE, reset) if taps > 1 else window_BWE


def _next_window(x_BLE: Tensor, window_BWE: Tensor, reset: Tensor | None) -> Tensor:
    size = window_BWE.shape[1]
    inputs = torch.cat([window_BWE, x_BLE[:, -size:]], 1)[:, -size:]
    if reset is None:
        return inputs
    # An input is kept if no reset comes after it.
    later = F.pad(reset[:, -size:], (max(size - reset.shape[1], 0), 1))[:, 1:]
    gone = later.flip(1).cumsum(1).flip(1) > 0
    return inputs.masked_fill(gone.unsqueeze(-1), 0)


def _shifted_products(
    x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor | None, window_BWE: Tensor, reset: Tensor | None
) -> Tensor:
    """A grouped ``conv1d`` on a CPU takes about three times as long."""
    length, taps = x_BLE.shape[1], weight_EW.shape[1]
    inputs = torch.cat([window_BWE, x_BLE], 1)
    y_BLE = x_BLE * weight_EW[:, -1] if bias_E is None else torch.addcmul(bias_E, x_BLE, weight_EW[:, -1])
    segment = None if reset is None else F.pad(reset.cumsum(1), (taps - 1, 0))
    for tap in reversed(range(taps - 1)):
        shifted = inputs[:, tap : tap + length]
        if segment is not None:
            reached = (segment[:, tap : tap + length] == segment[:, taps - 1 :]).unsqueeze(-1)
            shifted = torch.where(reached, shifted, 0)
        y_BLE = torch.addcmul(y_BLE, shifted, weight_EW[:, tap])
    return y_BLE


class _OnGpu(torch.autograd.Function):
    """``ops.gpu.conv``."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: Tensor,
        reset: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, window, reset)
        ctx.module, ctx.silu = module, silu
        return module.forward(x, weight, bias, window, reset, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.module.backward(*ctx.saved_tensors, ctx.silu, grad_outputs[0]), None, None


class _Fused(torch.autograd.Function):
    """``ops.kernels.conv``."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        window: Tensor,
        reset: Tensor | None,
        silu: bool,
    ) -> Tensor:
        given = [t.contiguous() for t in (x, weight.T, bias, window)]
        given.append(torch.zeros(0, 0, dtype=torch.bool) if reset is None else reset.contiguous())
        y = torch.empty_like(given[0], dtype=weight.dtype)
        arrays = module.arrays(*given, y)
        units = x.shape[0] * -(-x.shape[1] // module.SPAN)
        module.over_rows(units, lambda b, e: module.forward(b, e, *arrays[:-1], silu, arrays[-1]))
        ctx.save_for_backward(*given)
        ctx.module, ctx.silu, ctx.units = module, silu, units
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        module = ctx.module
        x, weight, bias, window, reset = ctx.saved_tensors
        dx, dwindow = torch.empty_like(x), torch.zeros_like(window)
        dweight, dbias = x.new_zeros(ctx.units, *weight.shape), x.new_zeros(ctx.units, *bias.shape)
        given = module.arrays(x, weight, bias, window, reset)
        grads = module.arrays(grad_outputs[0], dx, dweight, dbias, dwindow)
        module.over_rows(ctx.units, lambda b, e: module.backward(b, e, *given, ctx.silu, *grads))
        return None, dx, dweight.sum(0).T, dbias.sum(0), dwindow, None, None
