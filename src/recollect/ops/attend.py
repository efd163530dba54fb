"""Masked softmax attention on rows, as partial sums that can be merged.

A union of key sets is attended in several passes over disjoint parts. Each pass gives a weighted sum of values, the sum
of its weights, and the maximum its weights are relative to; merging rescales to a common maximum. Maxima carry no
gradient: the merged quotient does not depend on them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """``sum w v`` (R, L, P), ``sum w`` (R, L, 1) and the maximum logit m (R, L, 1) that w = exp(logit - m)
    refers to.
    """

    total: Tensor
    weight: Tensor
    maximum: Tensor

    def normalised(self) -> Tensor:
        """The attention output; zero where no key was admitted."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0)


def lowest(dtype: torch.dtype) -> float:
    """The maximum of an empty set of logits: finite, so that differences of maxima stay finite."""
    return torch.finfo(dtype).min / 4


def attend(q_RLN: Tensor, k_RSN: Tensor, v_RSP: Tensor, mask_RLS: Tensor, scale: float) -> Partial:
    """One dense block: cost O(R L S (N + P)), memory O(R L S)."""
    logits = torch.bmm(q_RLN * scale, k_RSN.transpose(1, 2)).masked_fill(~mask_RLS, lowest(q_RLN.dtype))
    maximum = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - maximum).masked_fill(maximum == lowest(q_RLN.dtype), 0)
    return Partial(torch.bmm(weights, v_RSP), weights.sum(-1, keepdim=True), maximum)


def merge(parts: list[Partial]) -> Partial:
    """Join passes over disjoint key sets."""
    if len(parts) == 1:
        return parts[0]
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    factors = [torch.exp(part.maximum - maximum) for part in parts]
    total = sum((p.total * f for p, f in zip(parts, factors, strict=True)), torch.zeros((), device=maximum.device))
    weight = sum((p.weight * f for p, f in zip(parts, factors, strict=True)), torch.zeros((), device=maximum.device))
    return Partial(total, weight, maximum)
