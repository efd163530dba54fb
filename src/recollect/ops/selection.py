"""Learning which keys to keep: the losses of key selection.

HAX (arXiv 2507.00449) scores a key by a small network and keeps the best. Selection has no gradient, so the scores are
trained to tell how much later queries will use a key:

* *ranking*, as published: for pairs (a, b) of keys, binary cross-entropy of x_a - x_b against whether the reference
  y_a is above y_b (1), equal (1/2) or below (0), y being a sum of sigmoids without competition between keys;
* *kl*: the softmax of the scores against the share of softmax attention that each key receives, as the indexer of
  DeepSeek-V3.2 is trained.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.ops.scan import accumulator_dtype
from recollect.ops.teacher import ranked_positions, teach


def selection_loss(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    score_BLH: Tensor,
    *,
    n: int,
    reset: Tensor | None = None,
    target: Literal["mean", "sum"] = "mean",
    scale: float | None = None,
) -> Tensor:
    """Pairwise ranking loss over ``n`` keys per sequence; a scalar. Cost O(B H n (L N + n)).

    The reference of key j is sigmoid(q_i . k_j * scale) over the later queries i >= j of its segment, detached, summed
    as published or averaged; ``scale`` defaults to N^-1/2. The sum grows with the number of queries still to come and
    so mostly ranks early before late; the mean estimates use per query, which is what eviction must compare. Pairs of
    different segments never compete for a slot and are left out.
    """
    batch, length = q_BLHN.shape[:2]
    factor = 1 / math.sqrt(q_BLHN.shape[-1]) if scale is None else scale
    at = ranked_positions(length, n, q_BLHN.device)
    with torch.no_grad():
        k = k_BLHN[:, at]
        use = torch.einsum("blhn,bkhn->bhkl", q_BLHN, k).mul_(factor).sigmoid_()
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


def selection_divergence(
    q_BLHN: Tensor, k_BLHN: Tensor, score_BLH: Tensor, *, n: int, scale: float, reset: Tensor | None = None
) -> Tensor:
    """KL from the use of keys to the softmax of their scores, a scalar. Cost O(B H n L N), memory O(B H n L).

    The use of key j is the mean, over the sampled queries i >= j of its segment, of the attention a_ij it gets times
    the number of keys that i sees: attention in units of what indifference would pay. (Without that factor early keys
    would seem in demand merely because their first readers had little choice.) Uses are normalised over the keys of a
    segment that some sampled query sees; segments count by their keys. Detached from q and k.
    """
    batch, length, heads = score_BLH.shape
    with torch.no_grad():
        taught = teach(q_BLHN, k_BLHN, n=n, reset=reset, scale=scale)
        readers = taught.seen_BnL.sum(1)[:, None].expand(-1, heads, -1)
        demand = (taught.attention_BHnL * taught.seen_BnL.sum(-1)[:, None, :, None]).sum(2)
        use = demand / readers.clamp(min=1)
        counted = readers > 0
        segment = torch.zeros_like(readers) if reset is None else reset.cumsum(1)[:, None].expand_as(readers)
        target = use / _per_segment(use, segment).clamp(min=torch.finfo(use.dtype).tiny)
        size = _per_segment(counted.to(use.dtype), segment)
    score = score_BLH.to(accumulator_dtype(score_BLH.dtype)).transpose(1, 2).masked_fill(~counted, -torch.inf)
    top = score.new_full((batch, heads, length + 1), -torch.inf).scatter_reduce(2, segment, score.detach(), "amax")
    # A segment that no sampled query sees has no largest score; its keys do not count.
    score = (score - top.gather(2, segment).masked_fill(~counted, 0)).masked_fill(~counted, -torch.inf)
    total = _per_segment(score.exp(), segment)
    predicted = (score - total.where(counted, 1).log()).masked_fill(~counted, 0)
    divergence = torch.xlogy(target, target) - target * predicted
    return (divergence * size).sum() / counted.sum()


def _per_segment(x_BHL: Tensor, segment_BHL: Tensor) -> Tensor:
    """The sum over its segment, at every position."""
    sums = x_BHL.new_zeros(*x_BHL.shape[:2], x_BHL.shape[2] + 1).scatter_add(2, segment_BHL, x_BHL)
    return sums.gather(2, segment_BHL)
