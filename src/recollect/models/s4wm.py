"""S4WM's dynamics (arXiv 2307.02064): a posterior without history, and a prior on any backbone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recollect.core.layer import LayerOut
from recollect.core.state import detach
from recollect.core.types import State
from recollect.models import latent
from recollect.models.backbone import Backbone
from recollect.models.dense import dense
from recollect.models.dynamics import Dynamics, DynamicsConfig, Frames, Observed, WorldState


class S4WM(Dynamics):
    """Posterior q(z_t | x_t), token g_t = MLP(z_{t-1}, a_t), history h_t = backbone(g_1 .. g_t), prior p(z_t | h_t).

    z_{t-1} is zero at the first step of an episode, and a_t is too. In training and over a context everything is
    parallel in time; imagination goes by single steps of the backbone. Time and memory are the backbone's.
    """

    @dataclass(frozen=True)
    class Config(DynamicsConfig, kind="s4wm"):
        """Any ``backbone``; with ``chunk``, states are carried over the cuts and gradients are not, as Transformer-XL
        is trained.
        """

        backbone: Backbone.Config

        @property
        def d_history(self) -> int:
            return self.backbone.d_model

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            return self.backbone.state_bytes(batch, dtype=dtype, seen=seen) + batch * self.latent.width * dtype.itemsize

    def __init__(self, config: Config, n_features: int, n_actions: int) -> None:
        super().__init__()
        self.config, self.latent = config, config.latent
        d_model, z_width = config.d_history, config.latent.width
        self.posterior_head = dense(n_features, config.hidden, z_width)
        self.token = dense(z_width + n_actions, config.hidden, d_model)
        self.backbone = Backbone(config.backbone)
        self.prior_head = dense(d_model, config.hidden, z_width)

    def init_state(self, batch: int) -> WorldState:
        zeros = next(self.parameters()).new_zeros
        c = self.config
        return WorldState(self.backbone.init_state(batch), zeros(batch, c.latent.width), zeros(batch, c.d_history))

    def observe(self, frames: Frames, state: WorldState | None = None) -> Observed:
        log_q = latent.log_probabilities(self.posterior_head(frames.features), self.config.latent)
        z = latent.draw(log_q, frames.noise)
        before = torch.zeros_like(z[:, :1]) if state is None else state.z[:, None]
        previous = torch.cat([before, z[:, :-1]], 1).masked_fill(frames.is_first[..., None], 0)
        tokens = self.token(torch.cat([previous, frames.action], -1))
        restarts = state is not None or (not frames.unbroken and bool(frames.is_first[:, 1:].any()))
        out = self._remember(tokens, None if state is None else state.inner, frames.is_first if restarts else None)
        after = WorldState(out.state, z[:, -1], out.y[:, -1])
        return Observed(out.y, z, log_q, self.prior(out.y), after, out.aux)

    def step(self, z: Tensor, action: Tensor, inner: State) -> tuple[Tensor, State]:
        return self.backbone.step(self.token(torch.cat([z, action], -1)), inner)

    def compiled(self) -> list[nn.Module]:
        return [self.backbone]

    def _remember(self, tokens: Tensor, inner: State | None, reset: Tensor | None) -> LayerOut:
        """The backbone over all tokens, chunk by chunk where gradients are to be cut."""
        size = self.config.chunk
        if size is None or tokens.shape[1] <= size:
            return self.backbone(tokens, inner, reset=reset)
        ys: list[Tensor] = []
        aux: dict[str, Tensor] = {}
        pieces = tokens.split(size, 1)
        cuts = [None] * len(pieces) if reset is None else reset.split(size, 1)
        for piece, cut in zip(pieces, cuts, strict=True):
            out = self.backbone(piece, inner, reset=cut)
            inner = detach(out.state)
            ys.append(out.y)
            for name, value in out.aux.items():
                share = value * (piece.shape[1] / tokens.shape[1])
                aux[name] = aux[name] + share if name in aux else share
        return LayerOut(torch.cat(ys, 1), inner, aux)
