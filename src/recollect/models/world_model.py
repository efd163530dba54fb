"""S4WM's world model on any backbone (arXiv 2307.02064).

    posterior  z_t ~ q(z_t | x_t)                 no history: all frames at once
    token      g_t = MLP(z_{t-1}, a_t)            a_t leads to x_t; both are zero at the first step of an episode
    history    h_t = backbone(g_1 .. g_t)         parallel over time in training, one step at a time in imagination
    prior      p(z_t | h_t);  decoder and reward read (h_t, z_t)

Loss per step, not counted at first steps: -log p(x_t | h_t, z_t) + balanced KL[q || p] - log p(r_t | h_t, z_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config as BaseConfig
from recollect.core.errors import ConfigError
from recollect.core.types import Aux, State
from recollect.models import latent
from recollect.models.backbone import Backbone
from recollect.models.latent import LatentConfig
from recollect.models.vision import Tiles, VisionConfig


class WorldState(NamedTuple):
    """All that imagination starts from: the backbone's state, and the last step's latent (B, Z) and history (B, D)."""

    backbone: State
    z: Tensor
    h: Tensor


class Observed(NamedTuple):
    """The context, understood: h (B, T, D), z (B, T, Z), log q and log p (B, T, groups, classes), the state to
    go on from.
    """

    h: Tensor
    z: Tensor
    log_q: Tensor
    log_p: Tensor
    state: WorldState
    aux: Aux


class Imagined(NamedTuple):
    """A dream: h (B, T, D), z (B, T, Z), actions (B, T, A), predicted observations, rewards (B, T), the state
    to go on from.
    """

    h: Tensor
    z: Tensor
    actions: Tensor
    observation: Tensor
    reward: Tensor
    state: WorldState


class Batch(NamedTuple):
    """Aligned windows: action_t leads to observation_t, reward_t arrives with it, is_first_t marks an
    episode's first step.
    """

    observation: Tensor  # (B, T, ...) uint8
    action: Tensor  # (B, T, A), zero at first steps
    reward: Tensor  # (B, T)
    is_first: Tensor  # (B, T) bool


Policy = Callable[[Tensor, Tensor], Tensor]
"""From h (B, D) and z (B, Z) of the last step to the next action (B, A)."""


class WorldModel(nn.Module):
    """Encoder, categorical latents, backbone, decoder and reward head; see the module's equations."""

    @dataclass(frozen=True)
    class Config(BaseConfig, kind="world-model"):
        """``kl_balance`` 0.8 and ``free_nats`` 1 are the paper's; ``reward_weight`` scales the reward's likelihood."""

        n_actions: int
        backbone: Backbone.Config
        vision: VisionConfig = field(default_factory=Tiles)
        latent: LatentConfig = field(default_factory=LatentConfig)
        hidden: int = 128
        kl_balance: float = 0.8
        free_nats: float = 1.0
        kl_weight: float = 1.0
        reward_weight: float = 1.0
        aux_weight: float = 0.1

        def __post_init__(self) -> None:
            if self.n_actions < 1 or self.hidden < 1:
                raise ConfigError(f"world-model: needs n_actions and hidden >= 1, got {self.n_actions}, {self.hidden}")
            if not 0 <= self.kl_balance <= 1 or self.free_nats < 0:
                raise ConfigError(
                    f"world-model: needs kl_balance in [0, 1] and free_nats >= 0, "
                    f"got {self.kl_balance} and {self.free_nats}"
                )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d_model, z_width = config.backbone.d_model, config.latent.width
        self.encoder, features = config.vision.encoder()
        self.posterior_head = nn.Linear(features, z_width)
        self.token = nn.Sequential(
            nn.Linear(z_width + config.n_actions, config.hidden), nn.SiLU(), nn.Linear(config.hidden, d_model)
        )
        self.backbone = Backbone(config.backbone)
        self.prior_head = nn.Sequential(nn.Linear(d_model, config.hidden), nn.SiLU(), nn.Linear(config.hidden, z_width))
        self.decoder = config.vision.decoder(d_model + z_width)
        self.reward_head = nn.Sequential(
            nn.Linear(d_model + z_width, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, 1),
        )

    def init_state(self, batch: int) -> WorldState:
        """Before the first frame of an episode."""
        zeros = self.posterior_head.weight.new_zeros
        c = self.config
        return WorldState(
            self.backbone.init_state(batch), zeros(batch, c.latent.width), zeros(batch, c.backbone.d_model)
        )

    def posterior(self, observation: Tensor) -> Tensor:
        """log q(z_t | x_t), (B, T, groups, classes)."""
        features = self.encoder(observation.flatten(0, 1))
        return latent.log_probabilities(self.posterior_head(features), self.config.latent).unflatten(
            0, observation.shape[:2]
        )

    def prior(self, h: Tensor) -> Tensor:
        """log p(z_t | h_t), (..., groups, classes)."""
        return latent.log_probabilities(self.prior_head(h), self.config.latent)

    def reward(self, h: Tensor, z: Tensor) -> Tensor:
        """The expected reward, a probability: rewards of these environments are 0 or 1."""
        return torch.sigmoid(self.reward_head(torch.cat([h, z], -1)).squeeze(-1))

    def observe(
        self, batch: Batch, state: WorldState | None = None, *, generator: torch.Generator | None = None
    ) -> Observed:
        """Take in frames in parallel over time. ``generator`` samples the posterior; None takes its mode."""
        log_q = self.posterior(batch.observation)
        z = latent.mode(log_q) if generator is None else latent.sample(log_q, generator)
        before = torch.zeros_like(z[:, :1]) if state is None else state.z[:, None]
        previous = torch.cat([before, z[:, :-1]], 1).masked_fill(batch.is_first[..., None], 0)
        out = self.backbone(
            self.token(torch.cat([previous, batch.action], -1)),
            None if state is None else state.backbone,
            reset=batch.is_first if state is not None or bool(batch.is_first[:, 1:].any()) else None,
        )
        after = WorldState(out.state, z[:, -1], out.y[:, -1])
        return Observed(out.y, z, log_q, self.prior(out.y), after, out.aux)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative evidence bound per counted frame, and its parts, detached."""
        c = self.config
        seen = self.observe(batch, generator=generator)
        counted = ~batch.is_first
        features = torch.cat([seen.h, seen.z], -1)[counted]
        image = self.decoder.loss(self.decoder(features), batch.observation[counted]).mean()
        kl = latent.kl_divergence(seen.log_q, seen.log_p)[counted].mean()
        balanced = latent.balanced_kl(seen.log_q, seen.log_p, c.kl_balance, c.free_nats)[counted].mean()
        logits = self.reward_head(features).squeeze(-1)
        reward = F.binary_cross_entropy_with_logits(logits, batch.reward[counted])
        total = image + c.kl_weight * balanced + c.reward_weight * reward
        for value in seen.aux.values():
            total = total + c.aux_weight * value
        metrics = {"image": image, "kl": kl, "reward": reward, **seen.aux}
        return total, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def imagine(
        self,
        state: WorldState,
        actions: Tensor | Policy,
        horizon: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Imagined:
        """Go on from ``state`` by single steps, sampling the prior (its mode without a generator).

        ``actions`` (B, T, A), or a policy with ``horizon`` steps. For n samples of one context, index the state with
        ``core.state.index_batch`` first. Cost: T steps of the backbone, whatever the context's length.
        """
        steps = actions.shape[1] if isinstance(actions, Tensor) else horizon
        if steps is None:
            raise ConfigError("imagine: a policy needs a horizon")
        inner, z, h = state
        hs, zs, taken = [], [], []
        for t in range(steps):
            action = actions[:, t] if isinstance(actions, Tensor) else actions(h, z)
            h, inner = self.backbone.step(self.token(torch.cat([z, action], -1)), inner)
            log_p = self.prior(h)
            z = latent.mode(log_p) if generator is None else latent.sample(log_p, generator)
            hs.append(h)
            zs.append(z)
            taken.append(action)
        h_all, z_all = torch.stack(hs, 1), torch.stack(zs, 1)
        return Imagined(
            h_all,
            z_all,
            torch.stack(taken, 1),
            self.reconstruct(h_all, z_all),
            self.reward(h_all, z_all),
            WorldState(inner, z, h),
        )

    def reconstruct(self, h: Tensor, z: Tensor) -> Tensor:
        """The observations (B, T, ...) that the decoder sees in (h, z)."""
        features = torch.cat([h, z], -1)
        decoded = self.decoder.observation(self.decoder(features.flatten(0, 1)))
        return decoded.unflatten(0, features.shape[:2])
