"""What sparse attention learns from: full causal attention of a sample of queries.

Choosing keys has no gradient, so hash planes and key scores are trained towards the attention that would be paid if
every key could be read. A sample of n queries per sequence costs O(n L N) instead of O(L^2 N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.scan import accumulator_dtype


class Taught(NamedTuple):
    """Attention of n sampled queries over all L keys."""

    at: Tensor
    """Positions of the queries, (n,) int64."""
    attention_BHnL: Tensor
    """Softmax over the keys that a query may see; 0 elsewhere."""
    seen_BnL: Tensor
    """Whether a key is in the query's segment and not after it."""


def ranked_positions(length: int, n: int, device: torch.device) -> Tensor:
    """``n`` distinct positions spread over 0..length-1 by the golden ratio: deterministic and without a period.

    A fixed stride would meet only keys, or only values, in sequences that alternate them.
    """
    if n >= length:
        return torch.arange(length, device=device)
    spread = torch.arange(1, length + 1, dtype=torch.float64, device=device) * 0.6180339887498949 % 1.0
    return spread.argsort()[:n].sort().values


def attend_fully(q_BLHN: Tensor, k_BLHN: Tensor, at: Tensor, *, reset: Tensor | None, scale: float) -> Taught:
    """softmax_j(q_i . k_j * scale) over the keys j <= i of the segment, for the queries i of ``at`` (n,).

    Differentiable in q and k. Cost O(B H n L N), memory O(B H n L).
    """
    batch, length = q_BLHN.shape[:2]
    seen = (torch.arange(length, device=at.device) <= at[:, None]).expand(batch, -1, -1)
    if reset is not None:
        segment = reset.cumsum(1)
        seen = seen & (segment[:, at, None] == segment[:, None, :])
    dtype = accumulator_dtype(q_BLHN.dtype)
    with torch.autocast(q_BLHN.device.type, enabled=False):
        logits = torch.einsum("blhn,bshn->bhls", q_BLHN[:, at].to(dtype), k_BLHN.to(dtype)) * scale
    attention = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return Taught(at, attention, seen)


@torch.no_grad()
def teach(q_BLHN: Tensor, k_BLHN: Tensor, *, n: int, reset: Tensor | None, scale: float) -> Taught:
    """``attend_fully`` for ``n`` queries spread over the sequence, as a target: without gradients."""
    return attend_fully(q_BLHN, k_BLHN, ranked_positions(q_BLHN.shape[1], n, q_BLHN.device), reset=reset, scale=scale)
