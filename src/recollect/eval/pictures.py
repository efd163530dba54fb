"""Pictures of tile codes, drawn where the codes lie: a batch travels to the device as codes, 192 times smaller."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from recollect.envs.tiles import TILE_PIXELS, atlas


def render_on(codes: Tensor) -> Tensor:
    """Pictures (..., 8 h, 8 w, 3) uint8 of codes (..., h, w) on their device: what ``envs.tiles.render`` draws.

    Cost: one lookup of 24 bytes per row of every tile, and an index of 8 bytes for it.
    """
    n = TILE_PIXELS
    *lead, h, w = codes.shape
    row = torch.arange(n, device=codes.device)[:, None]
    index = codes.long().unsqueeze(-2) * n + row
    return _rows(codes.device).index_select(0, index.flatten()).view(*lead, h * n, w * n, 3)


@cache
def _rows(device: torch.device) -> Tensor:
    """One row per pixel row of a tile, so that a lookup writes the picture in its final order."""
    return torch.tensor(atlas()).view(-1, TILE_PIXELS * 3).to(device)
