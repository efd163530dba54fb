"""Hashing directions: nearby vectors share a bucket, and the hash can be taught which vectors are near.

*sign*: a query and a key at angle t fall into the same bucket of ``n_bits`` random hyperplanes with probability
(1 - t/pi)^n_bits. *argmax*: the bucket is the nearest of 2^n_bits random directions; signs are the special case whose
directions are all signed sums of ``n_bits`` of them (arXiv 2507.00449, appendix A). No statistic over the sequence
enters, so the bucket of a position depends on that position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.ops import dispatch
from recollect.ops.patterns import HashRule
from recollect.ops.scan import accumulator_dtype
from recollect.ops.teacher import Taught

CROWDING = 4.0
"""Weight of a full bucket against a key that is missed. At 1 everything came to share a few buckets; at 8 keys were
missed for the sake of empty ones."""

SHARPNESS: dict[HashRule, float] = {"sign": 2.0, "argmax": 3.0}
"""Spread of soft codes: one of many columns stands out less than a sign does."""


def draw_planes(d: int, n_heads: int, n_rounds: int, n_planes: int, generator: torch.Generator | None = None) -> Tensor:
    """Normals of random hyperplanes (columns, under the argmax rule), (H, N, n_rounds, n_planes), standard normal."""
    return torch.randn(n_heads, d, n_rounds, n_planes, generator=generator)


@torch.no_grad()
def sign_buckets(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every vector, (B, L, H, n_rounds) int64 in [0, 2^n_bits): the signs of its projections as a binary
    number.

    ``planes`` (H, N, n_rounds, n_bits). Cost O(B L H N n_rounds n_bits). Not differentiable.
    """
    return read_buckets(project(x_BLHN, planes), "sign")


@torch.no_grad()
def argmax_buckets(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every vector, (B, L, H, n_rounds) int64 in [0, n_columns): its largest projection, the first of equals.

    ``planes`` (H, N, n_rounds, n_columns). Cost O(B L H N n_rounds n_columns). Not differentiable.
    """
    return read_buckets(project(x_BLHN, planes), "argmax")


def hash_buckets(x_BLHN: Tensor, planes: Tensor, rule: HashRule) -> Tensor:
    """``sign_buckets`` or ``argmax_buckets``. Scaling a vector by a positive number leaves its bucket as it was."""
    return read_buckets(project(x_BLHN, planes), rule)


@torch.no_grad()
def read_buckets(code_BLHRC: Tensor, rule: HashRule) -> Tensor:
    """Buckets (B, L, H, n_rounds) of projections (B, L, H, n_rounds, n_planes), whatever made them."""
    module = dispatch.gpu_kernels("bucketing", code_BLHRC)
    if module is not None:
        return module.read_buckets(code_BLHRC, rule)
    if rule == "argmax":
        return code_BLHRC.argmax(-1)
    return ((code_BLHRC > 0) * (1 << torch.arange(code_BLHRC.shape[-1], device=code_BLHRC.device))).sum(-1)


@torch.no_grad()
def probed_buckets(code_BLHC: Tensor, rule: HashRule, n: int) -> Tensor:
    """The n buckets nearest to a query of these projections, nearest first, (B, L, H, n) int64; the first is its own.

    Under signs a bucket is as far as the sum of |projection| over the bits that differ: the n cheapest of all sets of
    bits, which are among the sets of the n - 1 least certain ones. Under argmax the n largest projections.
    Cost O(B L H 2^(n - 1)) and a sort of the projections.
    """
    if rule == "argmax":
        return code_BLHC.topk(n, -1).indices
    certain, bit = code_BLHC.abs().sort(-1)
    sets = torch.arange(1 << (n - 1), device=code_BLHC.device)
    chosen = (sets[:, None] >> torch.arange(n - 1, device=code_BLHC.device)) & 1
    distance = (certain[..., None, : n - 1] * chosen).sum(-1)
    flips = ((1 << bit[..., None, : n - 1]) * chosen).sum(-1)
    nearest = distance.sort(dim=-1, stable=True).indices[..., :n]
    return read_buckets(code_BLHC, "sign")[..., None] ^ flips.gather(-1, nearest)


def plane_code(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Projections of unit vectors, (B, L, H, n_rounds, n_planes), at least in float32."""
    dtype = accumulator_dtype(x_BLHN.dtype)
    with torch.autocast(x_BLHN.device.type, enabled=False):
        return project(F.normalize(x_BLHN.to(dtype), dim=-1), planes.to(dtype))


def soft_code(code_BLHRC: Tensor, rule: HashRule) -> Tensor:
    """What ``hash_loss`` reads of projections: spread over the batch brought to ``SHARPNESS``, zero where it was.

    A bucket does not depend on scale, and so a loss must not either: codes that may grow become certain of the first
    division they find, and then learn no better one.
    """
    code = code_BLHRC.to(accumulator_dtype(code_BLHRC.dtype))
    axes = (0, 1) if rule == "sign" else (0, 1, 4)
    spread = (code - code.mean(axes, keepdim=True)).square().mean(axes, keepdim=True).sqrt()
    return SHARPNESS[rule] * code / spread.clamp(min=torch.finfo(code.dtype).eps)


def project(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Products of every vector with every plane's normal, (B, L, H, n_rounds, n_planes)."""
    n_rounds, n_planes = planes.shape[2:]
    projected = torch.einsum("blhn,hnk->blhk", x_BLHN, planes.flatten(2).to(x_BLHN.dtype))
    return projected.unflatten(-1, (n_rounds, n_planes))


def soft_agreement(q_BnHRC: Tensor, k_BLHRC: Tensor, rule: HashRule) -> Tensor:
    """Log of how likely two soft codes share a bucket in some round, (B, H, n, L), differentiable in both.

    With every bit of a code a coin of mean tanh(c), or every column drawn by softmax, one round's agreement is

        sign:    sum_b log((1 + tanh(c_q,b) tanh(c_k,b)) / 2)
        argmax:  log sum_c softmax_c(c_q) softmax_c(c_k)

    and rounds are joined by log-sum-exp: a key is read if any of them finds it. Cost O(B H n L n_rounds n_planes).
    """
    dtype = accumulator_dtype(q_BnHRC.dtype)
    with torch.autocast(q_BnHRC.device.type, enabled=False):
        q, k = q_BnHRC.to(dtype), k_BLHRC.to(dtype)
        if rule == "sign":
            # 1 + tanh x tanh y = cosh(x + y) / (cosh x cosh y), in logs: no bit can make the sum minus infinity.
            both, one = _log_cosh(q[:, :, None] + k[:, None]), _log_cosh(q)[:, :, None] + _log_cosh(k)[:, None]
            per_round = (both - one - math.log(2)).sum(-1).permute(4, 0, 3, 1, 2)
        else:
            meeting = torch.einsum("bnhrc,blhrc->rbhnl", q.softmax(-1), k.softmax(-1))
            per_round = meeting.clamp(min=torch.finfo(dtype).tiny).log()
    return per_round.logsumexp(0)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2)


def hash_loss(taught: Taught, q_code_BLHRC: Tensor, k_code_BLHRC: Tensor, rule: HashRule, *, n_keys: int) -> Tensor:
    """How badly soft codes find what the taught queries attend to within ``n_keys`` keys; a scalar.

    With P_ij the probability that key j shares a bucket with query i (``soft_agreement``) and a_ij its attention,

        mean_i s_i [ - sum_j a_ij log P_ij + CROWDING log(1 + sum_j P_ij / n_keys) ],    s_i = sum_j a_ij^2 - 1 / m_i

    over the m_i keys that the query sees: no key that counts may be missed, and the bucket may not hold more keys than
    are read. The weight s_i is near 1 for a query that picks one of many keys, and 0 for one that is content with their
    average, which no hash could serve, or sees a single key. Means over batch, heads and queries; gradients reach the
    codes alone. Cost O(B H n L n_rounds n_planes).
    """
    agreement = soft_agreement(q_code_BLHRC[:, taught.at], k_code_BLHRC, rule).clamp(max=0)
    attention = taught.attention_BHnL.detach()
    missed = -(attention * agreement).sum(-1)
    crowd = (agreement.exp() * taught.seen_BnL[:, None]).sum(-1)
    indifference = 1 / taught.seen_BnL.sum(-1).to(attention.dtype)
    sharp = (attention.square().sum(-1) - indifference[:, None]).clamp(min=0)
    return (sharp * (missed + CROWDING * torch.log1p(crowd / n_keys))).mean()
