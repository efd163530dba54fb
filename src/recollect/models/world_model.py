"""A world model: it sees, remembers and imagines (arXiv 2307.02064), with any dynamics of ``models.dynamics``.

    features   e_t = encoder(x_t)
    dynamics   history h_t, posterior q(z_t | ...), prior p(z_t | h_t); a_t leads to x_t
    heads      decoder, reward and continuation read (h_t, z_t)

Loss per step, not counted at first steps: -log p(x_t | h_t, z_t) + balanced KL[q || p] - log p(r_t | h_t, z_t)
- log p(the episode goes on | h_t, z_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config as BaseConfig
from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.steps import Steps
from recollect.core.types import State
from recollect.models import latent
from recollect.models.dense import dense
from recollect.models.dynamics import DynamicsConfig, Frames, Observed, WorldState
from recollect.models.in_chunks import in_chunks
from recollect.models.vision import Tiles, VisionConfig


class Imagined(NamedTuple):
    """A dream: h (B, T, D), z (B, T, Z), actions (B, T, A), predicted observations, rewards and chances to go on
    (B, T), the state to go on from.
    """

    h: Tensor
    z: Tensor
    actions: Tensor
    observation: Tensor
    reward: Tensor
    goes_on: Tensor
    state: WorldState


class Batch(NamedTuple):
    """Aligned windows: action_t leads to observation_t, reward_t arrives with it, is_first_t marks an
    episode's first step, is_terminal_t a last one that no future follows.
    """

    observation: Tensor  # (B, T, ...) uint8
    action: Tensor  # (B, T, A), zero at first steps
    reward: Tensor  # (B, T)
    is_first: Tensor  # (B, T) bool
    is_terminal: Tensor  # (B, T) bool
    unbroken: bool = False
    """Known before it is on a device, which then need not be asked: every row begins with an episode's first step and
    holds no other one. False: it may be otherwise."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """``change`` applied to every tensor; rows may come, go, and end sooner, not begin elsewhere."""
        return Batch(*(change(part) for part in self.tensors), unbroken=self.unbroken)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in order."""
        return self.observation, self.action, self.reward, self.is_first, self.is_terminal

    def counted(self, x: Tensor) -> Tensor:
        """What stands at steps that carry loss, (N, ...) of x (B, T, ...): all but first ones. Where the batch may be
        broken the host waits for the device to say how many they are.
        """
        return x[:, 1:].flatten(0, 1) if self.unbroken else x[~self.is_first]


Policy = Callable[[Tensor, Tensor], Tensor]
"""From h (B, D) and z (B, Z) of the last step to the next action (B, A)."""


class WorldModel(nn.Module):
    """Encoder, dynamics, decoder, heads of reward and continuation; see the module's equations."""

    @dataclass(frozen=True)
    class Config(BaseConfig, kind="world-model"):
        """``kl_balance`` 0.8 and ``free_nats`` 1 are the paper's; the weights scale likelihoods in the loss, and a
        weight of 0 leaves that head out of it.

        ``frames_at_once``: with more frames in a batch, encoder and decoder run over so many at a time, and again for
        their gradients; the same numbers up to rounding, in memory that does not grow with the episodes' length.
        """

        n_actions: int
        dynamics: DynamicsConfig
        vision: VisionConfig = field(default_factory=Tiles)
        hidden: int = 128
        """Width of the MLPs of features and heads."""
        kl_balance: float = 0.8
        free_nats: float = 1.0
        image_weight: float = 1.0
        kl_weight: float = 1.0
        reward_weight: float = 1.0
        continue_weight: float = 1.0
        aux_weight: float = 0.1
        frames_at_once: int = 4096

        def __post_init__(self) -> None:
            for name in ("n_actions", "hidden", "frames_at_once"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"world-model.{name} must be at least 1, got {getattr(self, name)}")
            if not 0 <= self.kl_balance <= 1 or self.free_nats < 0:
                raise ConfigError(
                    f"world-model: needs kl_balance in [0, 1] and free_nats >= 0, "
                    f"got {self.kl_balance} and {self.free_nats}"
                )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, features = config.hidden, config.dynamics.d_history + config.dynamics.latent.width
        self.encoder, seen = config.vision.encoder()
        self.embed = nn.Sequential(dense(seen, hidden, hidden, 0), nn.LayerNorm(hidden, eps=1e-3), nn.SiLU())
        self.dynamics = config.dynamics.build(hidden, config.n_actions)
        self.decoder = config.vision.decoder(features)
        self.reward_head = dense(features, hidden, 1, 2, out_scale=0)
        self.continue_head = dense(features, hidden, 1, 2, out_scale=0)

    def init_state(self, batch: int) -> WorldState:
        """Before the first frame of an episode."""
        return self.dynamics.init_state(batch)

    def reward(self, h: Tensor, z: Tensor) -> Tensor:
        """The expected reward, a probability: rewards of these environments are 0 or 1."""
        return torch.sigmoid(self.reward_head(torch.cat([h, z], -1)).squeeze(-1).float())

    def goes_on(self, h: Tensor, z: Tensor) -> Tensor:
        """The probability that the episode has a future."""
        return torch.sigmoid(self.continue_head(torch.cat([h, z], -1)).squeeze(-1).float())

    def observe(
        self, batch: Batch, state: WorldState | None = None, *, generator: torch.Generator | None = None
    ) -> Observed:
        """Take in frames. ``generator`` samples the posterior; None takes its mode."""
        self._check(batch)
        shape = batch.is_first.shape
        features = in_chunks(self._see, self.config.frames_at_once, batch.observation.flatten(0, 1))
        noise = latent.noise((shape[0], shape[1]), self.config.dynamics.latent, generator, features.device)
        return self.dynamics.observe(
            Frames(features.unflatten(0, shape), batch.action, batch.is_first, noise, batch.unbroken), state
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative evidence bound per counted frame, and its parts, detached. Only counted frames are decoded."""
        c = self.config
        seen = self.observe(batch, generator=generator)
        counted = batch.counted
        features = counted(torch.cat([seen.h, seen.z], -1))
        image = in_chunks(self._image_loss, c.frames_at_once, features, counted(batch.observation)).mean()
        kl = counted(latent.kl_divergence(seen.log_q, seen.log_p)).mean()
        balanced = counted(latent.balanced_kl(seen.log_q, seen.log_p, c.kl_balance, c.free_nats)).mean()
        total = c.image_weight * image + c.kl_weight * balanced
        metrics = {"image": image, "kl": kl, **seen.aux}
        if c.reward_weight:
            metrics["reward"] = _cross_entropy(self.reward_head, features, counted(batch.reward))
            total = total + c.reward_weight * metrics["reward"]
        if c.continue_weight:
            goes_on = (~counted(batch.is_terminal)).to(features.dtype)
            metrics["continue"] = _cross_entropy(self.continue_head, features, goes_on)
            total = total + c.continue_weight * metrics["continue"]
        for value in seen.aux.values():
            total = total + c.aux_weight * value
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
        ``core.state.index_batch`` first. Cost: T steps of the dynamics, whatever the context's length.
        """
        steps = actions.shape[1] if isinstance(actions, Tensor) else horizon
        if steps is None:
            raise ConfigError("imagine: a policy needs a horizon")
        hs, zs, taken = [], [], []
        h, z = state.h, state.z
        with unchanging():
            dream = Steps(self._dreamt, state)
            for t in range(steps):
                action = actions[:, t] if isinstance(actions, Tensor) else actions(h, z)
                h, z = dream(action, self._noise(state, generator))
                hs.append(h)
                zs.append(z)
                taken.append(action)
            state = cast(WorldState, dream.state)
        h, z = torch.stack(hs, 1), torch.stack(zs, 1)
        seen = self.reconstruct(h, z)
        return Imagined(h, z, torch.stack(taken, 1), seen, self.reward(h, z), self.goes_on(h, z), state)

    def imagine_step(
        self, state: WorldState, action: Tensor, *, generator: torch.Generator | None = None
    ) -> WorldState:
        """One step of a dream: action (B, A), and a latent drawn from the prior (its mode without a generator)."""
        return self._dreamt(state, (action, self._noise(state, generator)))[1]

    def _dreamt(self, state: State, inputs: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor, Tensor], WorldState]:
        """(h, z) and the state after an action, the latent drawn by the noise."""
        (inner, z, _), (action, noise) = cast(WorldState, state), inputs
        assert action is not None
        h, inner = self.dynamics.step(z, action, inner)
        z = latent.draw(self.dynamics.prior(h), noise)
        return (h, z), WorldState(inner, z, h)

    def _noise(self, state: WorldState, generator: torch.Generator | None) -> Tensor | None:
        return latent.noise((state.h.shape[0],), self.config.dynamics.latent, generator, state.h.device)

    @torch.no_grad()
    def reconstruct(self, h: Tensor, z: Tensor) -> Tensor:
        """The observations (B, T, ...) that the decoder sees in (h, z)."""
        features = torch.cat([h, z], -1)
        return in_chunks(self._picture, self.config.frames_at_once, features.flatten(0, 1)).unflatten(0, h.shape[:2])

    def _see(self, observation: Tensor) -> Tensor:
        return self.embed(self.encoder(observation))

    def _picture(self, features: Tensor) -> Tensor:
        return self.decoder.observation(self.decoder(features))

    def _image_loss(self, features: Tensor, truth: Tensor) -> Tensor:
        return self.decoder.loss(self.decoder(features), truth)

    def _check(self, batch: Batch) -> None:
        """Refuse what this model was not made for, before a layer does so in its own words."""
        c, shape = self.config, tuple(batch.observation.shape[2:])
        if batch.observation.dtype != torch.uint8:
            raise ConfigError(f"world-model: observations must be uint8, got {batch.observation.dtype}")
        if shape != c.vision.shape:
            raise ConfigError(f"world-model: made for observations of shape {c.vision.shape}, got {shape}")
        if batch.action.shape[-1] != c.n_actions:
            raise ConfigError(f"world-model: made for {c.n_actions} actions, got actions {batch.action.shape[-1]} wide")
        # Looking at numbers would make the host wait for a GPU, and cut a compiled graph in two.
        looks = batch.observation.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and c.vision.n_values < 256 and batch.observation.numel():
            highest = int(batch.observation.max())
            if highest >= c.vision.n_values:
                raise ConfigError(f"world-model: made for tile codes below {c.vision.n_values}, got {highest}")


def _cross_entropy(head: nn.Module, features: Tensor, truth: Tensor) -> Tensor:
    logits = head(features).squeeze(-1).float()
    return F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
