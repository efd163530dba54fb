"""The recurrent state-space model of DreamerV3 (arXiv 2301.04104), whose posterior reads the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.errors import ConfigError
from recollect.core.types import State
from recollect.models import latent
from recollect.models.dense import dense, linear_norm
from recollect.models.dynamics import Dynamics, DynamicsConfig, Frames, Observed, WorldState


class RSSMState(NamedTuple):
    """The deterministic state, (B, E)."""

    h: Tensor


class RSSM(Dynamics):
    """h_t = GRU(h_{t-1}, MLP(z_{t-1}, a_t)), posterior q(z_t | h_t, x_t), prior p(z_t | h_t).

    The cell is Dreamer's: a LayerNorm over all three parts of its input and state together, the reset gate inside the
    candidate's tanh, and an update gate that starts biased towards keeping. Sequential: O(T E^2) time.
    """

    @dataclass(frozen=True)
    class Config(DynamicsConfig, kind="rssm"):
        """``d_deter`` is E, the width of the deterministic state. Dreamer's truncation is ``chunk`` 48 to 64."""

        d_deter: int = 256

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.d_deter < 1:
                raise ConfigError(f"rssm: d_deter must be at least 1, got {self.d_deter}")

        @property
        def d_history(self) -> int:
            return self.d_deter

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return batch * (self.d_deter + self.latent.width) * dtype.itemsize

    def __init__(self, config: Config, n_features: int, n_actions: int) -> None:
        super().__init__()
        self.config, self.latent = config, config.latent
        E, hidden, Z = config.d_deter, config.hidden, config.latent.width
        self.token, self.token_norm = linear_norm(Z + n_actions, hidden)
        self.cell, self.cell_norm = linear_norm(hidden + E, 3 * E)
        self.posterior, self.posterior_norm = linear_norm(E + n_features, hidden)
        self.posterior_head = dense(hidden, hidden, Z, 0)
        self.prior_head = dense(E, hidden, Z)

    def init_state(self, batch: int) -> WorldState:
        zeros = self.cell.weight.new_zeros
        h = zeros(batch, self.config.d_deter)
        return WorldState(RSSMState(h), zeros(batch, self.config.latent.width), h)

    def observe(self, frames: Frames, state: WorldState | None = None) -> Observed:
        c = self.config
        B, T = frames.is_first.shape
        (h,), z, _ = self.init_state(B) if state is None else state
        kept = (~frames.is_first)[..., None].to(h.dtype)
        # What does not depend on the state is read for all steps at once.
        W_z, W_a = self.token.weight.split((c.latent.width, frames.action.shape[-1]), 1)
        W_h, W_x = self.posterior.weight.split((c.d_deter, frames.features.shape[-1]), 1)
        acted = F.linear(frames.action, W_a)
        seen = F.linear(frames.features, W_x)
        hs: list[Tensor] = []
        zs: list[Tensor] = []
        log_qs: list[Tensor] = []
        for t in range(T):
            if c.chunk is not None and t and t % c.chunk == 0:
                h, z = h.detach(), z.detach()
            h, z = h * kept[:, t], z * kept[:, t]
            h = self._advance(F.linear(z, W_z) + acted[:, t], h)
            features = F.silu(self.posterior_norm(F.linear(h, W_h) + seen[:, t]))
            log_q = latent.log_probabilities(self.posterior_head(features), c.latent)
            z = latent.draw(log_q, None if frames.noise is None else frames.noise[:, t])
            hs.append(h)
            zs.append(z)
            log_qs.append(log_q)
        h_all = torch.stack(hs, 1)
        after = WorldState(RSSMState(h), z, h)
        return Observed(h_all, torch.stack(zs, 1), torch.stack(log_qs, 1), self.prior(h_all), after, {})

    def step(self, z: Tensor, action: Tensor, inner: State) -> tuple[Tensor, State]:
        h = self._advance(self.token(torch.cat([z, action], -1)), inner.h)
        return h, RSSMState(h)

    def compiled(self) -> list[nn.Module]:
        # One step is too small to gain by compiling, and unrolling hundreds of them takes minutes.
        return []

    def _advance(self, token: Tensor, h: Tensor) -> Tensor:
        """h_t from the token before its normalisation and h_{t-1}."""
        parts = self.cell_norm(self.cell(torch.cat([F.silu(self.token_norm(token)), h], -1)))
        reset, candidate, update = parts.chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h
