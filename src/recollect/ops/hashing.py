"""Sign hashing: nearby directions share a bucket.

A query and a key at angle t fall into the same bucket of ``n_bits`` random hyperplanes with probability
(1 - t/pi)^n_bits. No statistic over the sequence enters, so the bucket of a position depends on that position alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_planes(d: int, n_heads: int, n_rounds: int, n_bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Normals of random hyperplanes, (H, N, n_rounds, n_bits), standard normal."""
    return torch.randn(n_heads, d, n_rounds, n_bits, generator=generator)


@torch.no_grad()
def sign_buckets(x_BLHN: Tensor, planes: Tensor) -> Tensor:
    """Bucket of every vector, (B, L, H, n_rounds) int64 in [0, 2^n_bits): the signs of its projections as a binary
    number.

    ``planes`` (H, N, n_rounds, n_bits). Cost O(B L H N n_rounds n_bits). Not differentiable.
    """
    n_rounds, n_bits = planes.shape[2:]
    projected = torch.einsum("blhn,hnk->blhk", x_BLHN, planes.flatten(2).to(x_BLHN.dtype))
    bits = (projected > 0).unflatten(-1, (n_rounds, n_bits))
    return (bits * (1 << torch.arange(n_bits, device=bits.device))).sum(-1)
