"""Mean cross-entropy of a linear head over masked positions, without the logits of all positions at once.

Logits (positions, vocabulary) are the largest tensor of a language model: at 131,072 positions and 50,280 words 26 GB,
and as much again for their gradient.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recollect.ops.scan import accumulator_dtype

WHOLE = 2**24
"""Most logits that ``masked_cross_entropy`` makes at once: 64 MiB in float32. Whole logits, with what backward needs of
them, take four times that, and about the time of chunks of this size (``docs/distributed.md``).
"""

_weight: ContextVar[float | None] = ContextVar("counted", default=None)


@contextmanager
def counting(weight: float | None) -> Generator[None]:
    """Inside, ``masked_cross_entropy`` multiplies its means by ``weight``: n times a part's share of the positions
    counted, for one of n parts of equally many rows, so that the mean over parts is the mean over all positions.
    """
    token = _weight.set(weight)
    try:
        yield
    finally:
        _weight.reset(token)


def masked_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, select: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the logits h W^T over the positions where ``mask`` is true, and the share of them that is
    right, for h (..., D), W (V, D), labels and mask (...).

    ``select``: make logits of these positions only. The host must then learn how many they are, and waits for a GPU;
    None therefore makes those of all positions there, while they are no more than ``WHOLE`` numbers. Above that,
    logits are made in chunks. NaN where nothing is masked, as any mean of nothing; but 0 in a part of a batch
    (``counting``).
    """
    part = _weight.get()
    if select is None:
        select = h.device.type == "cpu" or mask.numel() * weight.shape[0] > WHOLE
    means = _among_masked if select else _among_all
    loss, accuracy = means(h, weight, labels, mask, empty=part is not None)
    return (loss, accuracy) if part is None else (loss * part, accuracy * part)


def _among_masked(h: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, empty: bool) -> tuple[Tensor, Tensor]:
    """Both means from the logits of masked positions; where nothing is masked NaN, or 0 if that may be (``empty``)."""
    h, wanted = h[mask], labels[mask]
    n, n_words = h.shape[0], weight.shape[0]
    if n * n_words > WHOLE:
        loss, n_right = _chunked(h, weight, wanted, max(1, WHOLE // n_words))
        return loss, n_right / n
    logits = F.linear(h, weight)
    if empty and n == 0:
        # Nothing to learn, but every process must take the same way back through the model.
        return logits.sum(), h.new_zeros(())
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def _among_all(h: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, empty: bool) -> tuple[Tensor, Tensor]:
    """The same from the logits of all positions."""
    counted, n = mask.flatten(), mask.sum()
    wanted = labels.flatten().masked_fill(~counted, 0)
    logits = F.linear(h.flatten(0, -2), weight)
    each = F.cross_entropy(logits, wanted, reduction="none").masked_fill(~counted, 0)
    n_right = ((logits.argmax(-1) == wanted) & counted).sum()
    n = n.clamp(min=1) if empty else n
    return each.sum() / n, n_right / n


def chunked_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The mean over masked positions of ``F.cross_entropy(h W^T, labels)``, and how many of them are right (int64).

    h (..., D), W (V, D), labels (...) int64, mask (...) bool; None counts every position. ``chunk`` positions have
    logits at a time. Their gradients are made in the same pass: three matrix products as for whole logits, where
    recomputing in backward takes four. Memory O(chunk V), and from forward to backward the gradients of h and, in
    float32, of W. Log-sum-exp and sums are float32 at least; products run in autocast's type where it is on.
    Differentiable once. NaN where nothing is masked.
    """
    if mask is None:
        return _chunked(h.flatten(0, -2), weight, labels.flatten(), chunk)
    return _chunked(h[mask], weight, labels[mask], chunk)


def _chunked(h: Tensor, weight: Tensor, wanted: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    return _CrossEntropy.apply(h, weight, wanted, chunk, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    """Rows of h (N, D) in chunks; the gradients wait in ``ctx`` for the one number that backward brings."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, wanted: Tensor, chunk: int, learning: bool) -> tuple[Tensor, ...]:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        summed = accumulator_dtype(dtype)
        n = h.shape[0]
        to_h, to_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        h_grad = torch.empty_like(h) if to_h else None
        weight_grad = torch.zeros_like(weight, dtype=summed) if to_weight else None
        total = torch.zeros((), dtype=summed, device=h.device)
        n_right = torch.zeros((), dtype=torch.int64, device=h.device)
        with torch.autocast(kind, enabled=False):
            words = weight.to(dtype)
            for start in range(0, n, chunk):
                rows, labels = h[start : start + chunk].to(dtype), wanted[start : start + chunk, None]
                logits = (rows @ words.T).to(summed)
                n_right += (logits.argmax(-1, keepdim=True) == labels).sum()
                scale = logits.logsumexp(-1, keepdim=True)
                total += (scale - logits.gather(-1, labels)).sum()
                if h_grad is None and weight_grad is None:
                    continue
                slope = logits.sub_(scale).exp_()
                slope.scatter_add_(-1, labels, slope.new_full(labels.shape, -1.0))
                slope = slope.div_(n).to(dtype)
                if h_grad is not None:
                    h_grad[start : start + chunk] = slope @ words
                if weight_grad is not None:
                    if slope.dtype == summed:
                        weight_grad.addmm_(slope.T, rows)
                    else:
                        weight_grad += slope.T @ rows
        ctx.save_for_backward(h_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(n_right)
        return total / n, n_right

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        h_grad, weight_grad = ctx.saved_tensors
        return (
            None if h_grad is None else h_grad * grad.to(h_grad.dtype),
            None if weight_grad is None else weight_grad * grad.to(weight_grad.dtype),
            None,
            None,
            None,
        )
