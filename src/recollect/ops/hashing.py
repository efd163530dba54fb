"""Hashing directions: nearby vectors share a bucket, and the hash can be taught which vectors are near.

*sign*: a query and a key at angle t fall into the same bucket of ``n_bits`` random hyperplanes with probability
(1 - t/pi)^n_bits. *argmax*: the bucket is the nearest of 2^n_bits random directions; signs are the special case whose
directions are all signed sums of ``n_bits`` of them (arXiv 2507.00449, appendix A). No statistic over the sequence
enters, so the bucket of a position depends on that position alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.ops.patterns import HashRule
from recollect.ops.scan import accumulator_dtype
from recollect.ops.teacher import teach

SHARPNESS: dict[HashRule, float] = {"sign": 1.0, "argmax": 3.0}
"""Scale of the projections in soft codes, at planes as drawn: one of many columns stands out less than a sign does."""


def draw_planes(d: int, n_heads: int, n_rounds: int, n_planes: int, generator: torch.Generator | None = None) -> Tensor:
    """Normals of random hyperplanes (columns, under the argmax rule), (H, N, n_rounds, n_planes), standard normal."""
    return torch.randn(n_heads, d, n_rounds, n_planes, generator=generator)


@torch.no_grad()
def sign_buckets(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every vector, (B, L, H, n_rounds) int64 in [0, 2^n_bits): the signs of its projections as a binary
    number.

    ``planes`` (H, N, n_rounds, n_bits). Cost O(B L H N n_rounds n_bits). Not differentiable.
    """
    n_bits = planes.shape[3]
    bits = _project(x_BLHN, planes) > 0
    return (bits * (1 << torch.arange(n_bits, device=bits.device))).sum(-1)


@torch.no_grad()
def argmax_buckets(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every vector, (B, L, H, n_rounds) int64 in [0, n_columns): its largest projection, the first of equals.

    ``planes`` (H, N, n_rounds, n_columns). Cost O(B L H N n_rounds n_columns). Not differentiable.
    """
    return _project(x_BLHN, planes).argmax(-1)


def hash_buckets(x_BLHN: Tensor, planes: Tensor, rule: HashRule) -> Tensor:
    """``sign_buckets`` or ``argmax_buckets``. Scaling a vector by a positive number leaves its bucket as it was."""
    return sign_buckets(x_BLHN, planes) if rule == "sign" else argmax_buckets(x_BLHN, planes)


def _project(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    n_rounds, n_planes = planes.shape[2:]
    projected = torch.einsum("blhn,hnk->blhk", x_BLHN, planes.flatten(2).to(x_BLHN.dtype))
    return projected.unflatten(-1, (n_rounds, n_planes))


def soft_agreement(q_BnHN: Tensor, k_BLHN: Tensor, planes: Tensor, rule: HashRule) -> Tensor:
    """How nearly two vectors share a bucket in some round, (B, H, n, L), differentiable in all arguments.

    With unit vectors u = x / |x| and s = ``SHARPNESS``, one round's agreement is

        sign:    sum_b tanh(s u_q . w_b) tanh(s u_k . w_b)
        argmax:  log sum_c softmax_c(s u_q . w_c) softmax_c(s u_k . w_c)

    and rounds are joined by log-sum-exp: a key is read if any of them finds it. Cost O(B H n L n_rounds n_planes).
    """
    dtype = accumulator_dtype(q_BnHN.dtype)
    with torch.autocast(q_BnHN.device.type, enabled=False):
        q, k = (
            SHARPNESS[rule] * _project(F.normalize(x.to(dtype), dim=-1), planes.to(dtype)) for x in (q_BnHN, k_BLHN)
        )
        if rule == "sign":
            per_round = torch.einsum("bnhrc,blhrc->rbhnl", q.tanh(), k.tanh())
        else:
            meeting = torch.einsum("bnhrc,blhrc->rbhnl", q.softmax(-1), k.softmax(-1))
            per_round = meeting.clamp(min=torch.finfo(dtype).tiny).log()
    return per_round.logsumexp(0)


def hash_loss(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    planes: Tensor,
    rule: HashRule,
    *,
    n: int,
    scale: float,
    reset: Tensor | None = None,
) -> Tensor:
    """KL from the attention of ``n`` queries to the softmax of their soft agreement with the same keys; a scalar.

    Hashing has no gradient; this one teaches the planes alone (q and k are detached) to put a query together with the
    keys it attends to. Means over batch, heads and queries. Cost O(B H n L (N + n_rounds n_planes)).
    """
    q, k = q_BLHN.detach(), k_BLHN.detach()
    taught = teach(q, k, n=n, reset=reset, scale=scale)
    agreement = soft_agreement(q[:, taught.at], k, planes, rule)
    hidden = ~taught.seen_BnL[:, None]
    predicted = agreement.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0)
    target = taught.attention_BHnL
    return (torch.xlogy(target, target) - target * predicted).sum(-1).mean()
