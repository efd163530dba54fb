"""Vectors of independent categoricals with straight-through gradients, as in DreamerV2 and DreamerV3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.core.config import Config
from recollect.core.errors import ConfigError


@dataclass(frozen=True)
class LatentConfig(Config, kind="categorical-latent"):
    """``groups`` categoricals of ``classes`` each; ``unimix`` is the share of a uniform mixed into every
    distribution.
    """

    groups: int = 32
    classes: int = 32
    unimix: float = 0.01

    def __post_init__(self) -> None:
        if self.groups < 1 or self.classes < 2:
            raise ConfigError(f"latent: needs groups >= 1 and classes >= 2, got {self.groups} x {self.classes}")
        if not 0 <= self.unimix < 1:
            raise ConfigError(f"latent: unimix must be in [0, 1), got {self.unimix}")

    @property
    def width(self) -> int:
        """Z: length of a flattened sample, and of the logits that describe it."""
        return self.groups * self.classes


def log_probabilities(logits: Tensor, config: LatentConfig) -> Tensor:
    """Log of (1 - unimix) softmax(logits) + unimix / classes, (..., groups, classes) from logits (..., Z)."""
    log_p = torch.log_softmax(logits.unflatten(-1, (config.groups, config.classes)).float(), -1)
    if not config.unimix:
        return log_p
    return torch.log((1 - config.unimix) * log_p.exp() + config.unimix / config.classes)


def noise(
    shape: tuple[int, ...], config: LatentConfig, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """What ``draw`` samples by, (*shape, groups, 1) uniform on ``device``; None without a generator.

    Drawn where the generator lives: one on the CPU gives the same numbers to every device.
    """
    if generator is None:
        return None
    return torch.rand(*shape, config.groups, 1, generator=generator, device=generator.device).to(device)


def draw(log_p: Tensor, u: Tensor | None) -> Tensor:
    """One-hot samples (..., Z) whose gradient is that of the probabilities (straight-through), by uniform ``u`` (...,
    groups, 1); without it, the mode, which has no gradient.
    """
    if u is None:
        return mode(log_p)
    p = log_p.exp()
    chosen = (p.detach().cumsum(-1) < u.to(p.dtype)).sum(-1).clamp(max=p.shape[-1] - 1)
    return (_one_hot(chosen, p) + p - p.detach()).flatten(-2)


def _one_hot(chosen: Tensor, like: Tensor) -> Tensor:
    """Ones at ``chosen`` (...) of the last axis, zeros elsewhere, (..., classes) in the type of ``like``: without the
    integers, twice as wide, that ``functional.one_hot`` makes on the way.
    """
    return torch.zeros_like(like).scatter_(-1, chosen[..., None], 1)


def mode(log_p: Tensor) -> Tensor:
    """The most probable class of every group, one-hot (..., Z)."""
    return _one_hot(log_p.argmax(-1), log_p).flatten(-2)


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL[q || p] in nats, summed over groups: (...,)."""
    return (log_q.exp() * (log_q - log_p)).sum((-2, -1))


def balanced_kl(log_q: Tensor, log_p: Tensor, balance: float, free_nats: float) -> Tensor:
    """balance * max(f, KL[sg(q) || p]) + (1 - balance) * max(f, KL[q || sg(p)]) with f free nats, per position."""
    prior = kl_divergence(log_q.detach(), log_p).clamp(min=free_nats)
    posterior = kl_divergence(log_q, log_p.detach()).clamp(min=free_nats)
    return balance * prior + (1 - balance) * posterior
