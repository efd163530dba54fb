"""Learning which keys to keep: the ranking loss of key selection.

HAX (arXiv 2507.00449) scores a key by a small network and keeps the best. Selection has no gradient, so the scores are
trained to rank keys as the attention they will receive does: for pairs (a, b) of keys, binary cross-entropy of
x_a - x_b against whether the reference y_a is above y_b (1), equal (1/2) or below (0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def ranked_positions(length: int, n: int, device: torch.device) -> Tensor:
    """``n`` distinct positions spread over 0..length-1 by the golden ratio: deterministic and without a period.

    A fixed stride would meet only keys, or only values, in sequences that alternate them.
    """
    if n >= length:
        return torch.arange(length, device=device)
    spread = torch.arange(1, length + 1, dtype=torch.float64, device=device) * 0.6180339887498949 % 1.0
    return spread.argsort()[:n].sort().values


def selection_loss(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    score_BLH: Tensor,
    *,
    n: int,
    reset: Tensor | None = None,
    target: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Pairwise ranking loss over ``n`` keys per sequence; a scalar. Cost O(B H n (L N + n)).

    The reference of key j is sigmoid(q_i . k_j / sqrt N) over the later queries i >= j of its segment, detached,
    summed as published or averaged. The sum grows with the number of queries still to come and so mostly ranks early
    before late; the mean estimates use per query, which is what eviction must compare. Pairs of different segments
    never compete for a slot and are left out.
    """
    batch, length = q_BLHN.shape[:2]
    at = ranked_positions(length, n, q_BLHN.device)
    with torch.no_grad():
        k = k_BLHN[:, at]
        use = torch.einsum("blhn,bkhn->bhkl", q_BLHN, k).mul_(q_BLHN.shape[-1] ** -0.5).sigmoid_()
        later = (torch.arange(length, device=at.device) >= at[:, None]).expand(batch, -1, -1)
        same = torch.ones(batch, len(at), len(at), dtype=torch.bool, device=at.device)
        if reset is not None:
            segment = reset.cumsum(1)
            later = later & (segment[:, at, None] == segment[:, None, :])
            same = segment[:, at, None] == segment[:, None, at]
        reference = (use * later[:, None]).sum(-1)
        if target == "mean":
            reference = reference / later.sum(-1)[:, None]
        wanted = (reference[..., :, None] > reference[..., None, :]).to(q_BLHN.dtype)
        wanted = wanted + 0.5 * (reference[..., :, None] == reference[..., None, :])
        counted = same[:, None].expand_as(wanted).to(q_BLHN.dtype)
    score = score_BLH[:, at].transpose(1, 2)
    return (
        F.binary_cross_entropy_with_logits(
            score[..., :, None] - score[..., None, :], wanted, weight=counted, reduction="sum"
        )
        / counted.sum()
    )
