"""AdamW over a model's parameters, and the rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from recollect.train.run import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of 1-based ``step``; the equation is in ``TrainConfig``."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per (weight decay, rate scale); each group carries its ``scale``."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            key = (0.0 if spared else config.weight_decay, float(getattr(parameter, "_lr_scale", 1.0)))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_floating_point() for ps in groups.values() for p in ps),
    )
