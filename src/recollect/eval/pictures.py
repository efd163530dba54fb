"""Pictures of tile codes and codes of pictures; a batch travels to the device as codes, 192 times smaller."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recollect.core.errors import RunError
from recollect.envs.tiles import TILE_PIXELS, atlas

Bytes = npt.NDArray[np.uint8]


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


def tiles_of(pictures: Bytes, n_codes: int) -> Bytes:
    """The codes (..., h, w) whose tiles are nearest, in squared error, to those of pictures (..., 8 h, 8 w, 3).

    Only codes below ``n_codes`` are considered. Cost: one product of every tile with every code's, in slices.
    """
    n = TILE_PIXELS
    *lead, height, width, _ = pictures.shape
    h, w = height // n, width // n
    tiles = pictures.reshape(-1, h, n, w, n, 3).swapaxes(2, 3).reshape(-1, n * n * 3)
    known = torch.tensor(atlas()[:n_codes]).flatten(1).float()
    lengths = known.square().sum(1)
    codes = [(lengths - 2 * part.float() @ known.T).argmin(1) for part in torch.from_numpy(tiles).split(1 << 16)]
    return torch.cat(codes).to(torch.uint8).numpy().reshape(*lead, h, w)


def save_strips(strips: dict[str, npt.NDArray[Any]], out: Path, *, scale: int = 3, gap: int = 2) -> Path:
    """Write ``strips.npz`` and ``strips.png`` into ``out``: per episode a row of true frames over a row of imagined
    ones.

    Returns the picture's path. Raises RunError when Pillow is not installed or ``out`` is not a directory.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RunError("drawing needs the extra 'report': pip install 'recollect[report]'") from None
    pairs = np.stack([strips["strip_truth"], strips["strip_imagined"]], 1)  # (n, 2, T, H, W, 3)
    n, _, frames, height, width, _ = pairs.shape
    picture = np.full((n * (2 * (height + gap) + 2 * gap), frames * (width + gap), 3), 255, dtype=np.uint8)
    for i in range(n):
        for j in range(2):
            top = i * (2 * (height + gap) + 2 * gap) + j * (height + gap)
            for t in range(frames):
                left = t * (width + gap)
                picture[top : top + height, left : left + width] = pairs[i, j, t]
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give --out a directory")
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "strips.npz", allow_pickle=False, **strips)
    path = out / "strips.png"
    image = Image.fromarray(picture)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
    return path
