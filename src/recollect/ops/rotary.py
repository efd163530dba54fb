"""Rotary position encoding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BLHN: Tensor, position_BL: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate each pair (x_m, x_{m+N/2}) by the angle position * base^(-2m/N), so that q . k depends on
    distance only.
    """
    half = x_BLHN.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x_BLHN.device, dtype=torch.float64) / half)
    angle = position_BL[:, :, None, None].to(torch.float64) * frequency
    cos, sin = angle.cos().to(x_BLHN.dtype), angle.sin().to(x_BLHN.dtype)
    first, second = x_BLHN.split(half, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
