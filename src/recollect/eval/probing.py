"""Offline probing (arXiv 2210.13383): a small network reads walls and objects out of a frozen model's latent.

Episodes are observed from their beginning; probes are trained on every frame and scored on the second half of test
episodes, when there was time to see the maze.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from recollect.core.errors import DataError
from recollect.envs.base import Frames
from recollect.models.probe import Asked, Probe
from recollect.models.world_model import Batch, WorldModel

LAYOUT, POSITION, DIRECTION, OBJECTS = "maze_layout", "agent_pos", "agent_dir", "targets_vec"


def probe_scores(
    model: WorldModel,
    config: Probe.Config,
    drawn: Callable[[int], tuple[Batch, Frames]],
    test: Iterable[tuple[Batch, Frames]],
    generator: torch.Generator,
) -> dict[str, float]:
    """``walls_accuracy``, ``objects_mse`` and ``objects_rmse`` in cells of probes trained for ``config.steps`` batches.

    ``drawn`` gives the training batch of a 1-based step; ``test`` all test episodes. ``generator`` samples latents.
    Cost: the model's context pass over every batch, without gradients, and the probe's own.
    """
    probe: Probe | None = None
    optimizer: torch.optim.Optimizer | None = None
    with torch.enable_grad():
        for step in range(1, config.steps + 1):
            features, asked = _moments(model, *drawn(step), generator, since=0)
            if probe is None or optimizer is None:
                probe = _begin(config, features, asked, generator)
                optimizer = torch.optim.Adam(probe.parameters(), lr=config.lr)
            loss, _ = probe.loss(features, asked)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    assert probe is not None
    sums: dict[str, float] = {}
    count = 0
    for batch, frames in test:
        features, asked = _moments(model, batch, frames, generator, since=batch.is_first.shape[1] // 2)
        with torch.no_grad():
            _, told = probe.loss(features, asked)
        count += len(features)
        for name, values in told.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    if not count:
        raise DataError("probing needs test episodes of at least one frame")
    means = {name: total / count for name, total in sums.items()}
    return {**means, "objects_rmse": math.sqrt(means["objects_mse"])}


@torch.no_grad()
def _moments(
    model: WorldModel, batch: Batch, frames: Frames, generator: torch.Generator, since: int
) -> tuple[Tensor, Asked]:
    """Features (N, F) of frames ``since`` on of all episodes, and what is asked of them."""
    seen = model.observe(batch, generator=generator)
    features = torch.cat([seen.h, seen.z], -1)[:, since:].flatten(0, 1).float()
    values = (torch.from_numpy(frames[key][:, since:]) for key in (LAYOUT, POSITION, DIRECTION, OBJECTS))
    return features, Asked(*(value.flatten(0, 1).to(features.device) for value in values))


def _begin(config: Probe.Config, features: Tensor, asked: Asked, generator: torch.Generator) -> Probe:
    layout = (asked.layout.shape[1], asked.layout.shape[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return Probe(config, features.shape[-1], layout, asked.objects.shape[1]).to(features.device)
