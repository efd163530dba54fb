"""What a world model remembers when its eyes are closed: rewards and frames imagined after a context.

*Inference*: the whole episode is observed; the reward of the last step is read from history and posterior.
*Imagination*: only the context is observed; the query is imagined under the true actions, and the reward is read at
its end. Both count as right when the predicted reward is on the true side of 1/2. Frame errors are squared errors
summed over pixels and channels in [0, 1], averaged over frames and episodes; tile codes are drawn first, so both
observations compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recollect.core.errors import RunError
from recollect.eval.pictures import render_on
from recollect.models.world_model import Batch, WorldModel

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Dream:
    """One batch of episodes: what was, what was reconstructed while watching, and what was imagined from the
    context on.
    """

    context: int
    truth: Bytes  # (n, query, H, W, 3)
    imagined: Bytes  # (n, query, H, W, 3)
    reconstruction_mse: float
    generation_mse: npt.NDArray[np.float64]  # (query,) mean over episodes
    reward_true: npt.NDArray[np.float32]  # (n,) at the last step
    reward_inferred: npt.NDArray[np.float32]
    reward_imagined: npt.NDArray[np.float32]

    @property
    def inference_accuracy(self) -> float:
        """Share of episodes whose last reward is predicted from the whole episode."""
        return float(((self.reward_inferred > 0.5) == (self.reward_true > 0.5)).mean())

    @property
    def imagination_accuracy(self) -> float:
        """Share of episodes whose last reward is predicted from the context alone."""
        return float(((self.reward_imagined > 0.5) == (self.reward_true > 0.5)).mean())


@torch.no_grad()
def dream(model: WorldModel, batch: Batch, context: int, generator: torch.Generator) -> Dream:
    """Observe ``context`` frames of whole episodes, imagine the rest, and compare. ``generator`` samples latents."""
    seen = model.observe(batch, generator=generator)
    rebuilt = _picture(model.reconstruct(seen.h[:, 1:], seen.z[:, 1:]))
    frames = _picture(batch.observation)
    before = model.observe(Batch(*(field[:, :context] for field in batch)), generator=generator)
    ahead = model.imagine(before.state, batch.action[:, context:], generator=generator)
    imagined = _picture(ahead.observation)
    return Dream(
        context=context,
        truth=frames[:, context:],
        imagined=imagined,
        reconstruction_mse=float(squared_error(rebuilt, frames[:, 1:]).mean()),
        generation_mse=squared_error(imagined, frames[:, context:]).mean(0),
        reward_true=batch.reward[:, -1].cpu().numpy(),
        reward_inferred=model.reward(seen.h[:, -1], seen.z[:, -1]).cpu().numpy(),
        reward_imagined=ahead.reward[:, -1].cpu().numpy(),
    )


def squared_error(a: Bytes, b: Bytes) -> npt.NDArray[np.float64]:
    """Squared error on [0, 1] summed over pixels and channels: (n, T) for pictures (n, T, H, W, 3)."""
    return np.square((a.astype(np.float32) - b) / 255).sum((-3, -2, -1), dtype=np.float64)


def strip(result: Dream, n: int = 4, frames: int = 10) -> dict[str, npt.NDArray[Any]]:
    """A few episodes and evenly spaced frames of the query, truth and imagination, as arrays to draw or store."""
    query = result.truth.shape[1]
    at = np.unique(np.linspace(0, query - 1, min(frames, query)).round().astype(np.int64))
    return {
        "strip_truth": result.truth[:n, at],
        "strip_imagined": result.imagined[:n, at],
        "strip_step": result.context + at,
        "strip_reward_true": result.reward_true[:n],
        "strip_reward_imagined": result.reward_imagined[:n],
    }


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


def _picture(observation: Tensor) -> Bytes:
    """Pictures (n, T, H, W, 3) of tile codes (n, T, h, w), or the pictures themselves."""
    return (render_on(observation) if observation.ndim == 4 else observation).cpu().numpy()
