"""Probes of frozen world models: what of a maze can be read out of a model's latent (arXiv 2210.13383, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config as BaseConfig
from recollect.core.errors import ConfigError
from recollect.models.dense import linear_norm


class Asked(NamedTuple):
    """What N probed moments are asked: layouts (N, h, w) 0 or 1, the agent's position (N, 2) in cells and direction
    (N, 2), and vectors to S objects (N, S, 2) in cells, to the right and ahead.
    """

    layout: Tensor
    position: Tensor
    direction: Tensor
    objects: Tensor


class Probe(nn.Module):
    """Two MLPs: walls from (latent, position, direction), objects from the latent alone. Nothing flows into the latent.

    Loss: cross-entropy per cell of the layout; squared distance of every object, averaged over objects.
    """

    @dataclass(frozen=True)
    class Config(BaseConfig, kind="probe"):
        """The published protocol: 4 hidden layers 1024 wide with LayerNorm and ELU. Trained for ``steps`` batches at
        rate ``lr``.
        """

        hidden: int = 1024
        n_hidden: int = 4
        steps: int = 2000
        lr: float = 3e-4

        def __post_init__(self) -> None:
            for name in ("hidden", "n_hidden", "steps"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"probe.{name} must be at least 1, got {getattr(self, name)}")
            if not self.lr > 0:
                raise ConfigError(f"probe.lr must be positive, got {self.lr}")

    def __init__(self, config: Config, n_features: int, layout: tuple[int, int], n_objects: int) -> None:
        super().__init__()
        self.layout, self.n_objects = layout, n_objects
        self.walls = _net(config, n_features + 4, layout[0] * layout[1])
        self.objects = _net(config, n_features, 2 * n_objects)

    def forward(self, features: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """Logits of free cells (N, h, w), and vectors to objects (N, S, 2) in cells."""
        features = features.detach()
        size = max(self.layout)
        where = torch.cat([asked.position / size, asked.direction], -1)
        walls = self.walls(torch.cat([features, where], -1)).unflatten(-1, self.layout)
        return walls, size * self.objects(features).unflatten(-1, (self.n_objects, 2))

    def loss(self, features: Tensor, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """What to descend, and per moment (N,): share of cells told right, and mean squared distance of objects."""
        walls, objects = self(features, asked)
        truth = asked.layout.to(walls.dtype)
        distance = (objects - asked.objects).square().sum(-1).mean(-1)
        total = F.binary_cross_entropy_with_logits(walls, truth) + distance.mean() / max(self.layout) ** 2
        accuracy = ((walls > 0) == (truth > 0.5)).float().mean((-2, -1))
        return total, {"walls_accuracy": accuracy.detach(), "objects_mse": distance.detach()}


def _net(config: Probe.Config, n_in: int, n_out: int) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for _ in range(config.n_hidden):
        blocks += [*linear_norm(n_in, config.hidden), nn.ELU()]
        n_in = config.hidden
    return nn.Sequential(*blocks, nn.Linear(n_in, n_out))
