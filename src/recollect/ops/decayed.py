"""Attention with decay inside a chunk, and the masks that resets cut into it: shared by chunked linear recurrences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ResetMasks:
    """Which decays survive the resets inside every chunk; a segment is a run of positions without a reset."""

    def __init__(self, reset_BCQ: Tensor) -> None:
        segment_BCQ = reset_BCQ.cumsum(-1)
        size = reset_BCQ.shape[-1]
        causal_QS = torch.ones(size, size, dtype=torch.bool, device=reset_BCQ.device).tril()
        self.same_BCQS = (segment_BCQ.unsqueeze(-1) == segment_BCQ.unsqueeze(-2)) & causal_QS
        self.from_start_BCQ = segment_BCQ == 0
        self.to_end_BCQ = segment_BCQ == segment_BCQ[..., -1:]
        self.whole_BC = segment_BCQ[..., -1] == 0


class Within(torch.autograd.Function):
    """Decayed attention inside a chunk: y_q = sum_{s <= q} scores_qs exp(log_q - log_s) x_s.

    Written by hand because the (H, Q, Q) arrays bound the speed: with M = scores * decay the gradient of ``log`` needs
    only row and column sums of dM * M, which are dy . y and dx . x, so no such array is formed for it.
    """

    @staticmethod
    def forward(ctx: Any, scores_BCGQS: Tensor, log_BCHQ: Tensor, x_BCHQP: Tensor, same_BCQS: Tensor | None) -> Tensor:
        x_BCHQP = x_BCHQP.contiguous()
        # Above the diagonal the exponent may overflow to inf; those entries are overwritten, never multiplied.
        decay_BCHQS = (log_BCHQ.unsqueeze(-1) - log_BCHQ.unsqueeze(-2)).exp_()
        if same_BCQS is None:
            decay_BCHQS.tril_()
        else:
            decay_BCHQS.masked_fill_(~same_BCQS.unsqueeze(2), 0)
        grouped = (scores_BCGQS.shape[2], -1)
        mixing_BCHQS = (decay_BCHQS.unflatten(2, grouped) * scores_BCGQS.unsqueeze(3)).flatten(2, 3)
        y_BCHQP = mixing_BCHQS @ x_BCHQP
        ctx.save_for_backward(decay_BCHQS, mixing_BCHQS, x_BCHQP, y_BCHQP)
        ctx.grouped = grouped
        return y_BCHQP

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        decay_BCHQS, mixing_BCHQS, x_BCHQP, y_BCHQP = ctx.saved_tensors
        dy_BCHQP = grad_outputs[0].contiguous()
        dx_BCHQP = mixing_BCHQS.mT @ dy_BCHQP
        dscores_BCHQS = (dy_BCHQP @ x_BCHQP.mT).mul_(decay_BCHQS)
        dscores_BCGQS = dscores_BCHQS.unflatten(2, ctx.grouped).sum(3)
        dlog_BCHQ = (dy_BCHQP * y_BCHQP).sum(-1) - (dx_BCHQP * x_BCHQP).sum(-1)
        return dscores_BCGQS, dlog_BCHQ, dx_BCHQP, None
