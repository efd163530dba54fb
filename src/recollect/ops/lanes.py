"""How channels become the lanes of compiled kernels: blocks of channels first, channels of a block last."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_lanes(t: Tensor, lanes: int) -> Tensor:
    """(..., D, P, parts) to (..., blocks, P, parts, lanes), with zeros beyond the last channel."""
    width = t.shape[-3]
    blocks = -(-width // lanes)
    t = F.pad(t, (0, 0, 0, 0, 0, blocks * lanes - width))
    return t.unflatten(-3, (blocks, lanes)).movedim(-3, -1).contiguous()


def from_lanes(t: Tensor, width: int) -> Tensor:
    """(..., blocks, P, parts, lanes) to (..., D, P, parts)."""
    return t.movedim(-1, -3).flatten(-4, -3)[..., :width, :, :].contiguous()
