"""The position-wise part of a block, as a layer: so that the order of a block is a tuple of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer


class MlpState(NamedTuple):
    """Nothing: an MLP remembers no position."""


class Mlp(SequenceLayer):
    """y = W_out f(W_in x + b) + b' at every position, or with "swiglu" (arXiv 2002.05202)
    y = W_out (SiLU(g) * h) + b' with [g, h] = W_in x + b.

    O(L D^2 expand) time, no state.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="mlp"):
        """The hidden width is ``expand * d_model``, rounded; "swiglu" has two such projections in, the others one."""

        expand: float = 2.0
        activation: Literal["gelu", "swiglu", "relu"] = "gelu"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.expand > 0:
                raise ConfigError(f"mlp: expand must be positive, got {self.expand}; leave the layer out for none")
            if self.activation not in ("gelu", "swiglu", "relu"):
                raise ConfigError(f"mlp: activation must be gelu, swiglu or relu, got {self.activation!r}")

        @property
        def hidden(self) -> int:
            """Hidden width, at least 1."""
            return max(1, round(self.expand * self.d_model))

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "swiglu": cls(d_model=6, expand=1.5, activation="swiglu"),
                "relu": cls(d_model=4, expand=0.5, activation="relu"),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = config.activation
        gates = 2 if config.activation == "swiglu" else 1
        self.in_proj = nn.Linear(config.d_model, gates * config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.d_model)

    def init_state(
        self,
        batch: int,  # noqa: ARG002
        *,
        device: torch.device | str | None = None,  # noqa: ARG002
        dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> MlpState:
        return MlpState()

    def forward(self, x: Tensor, state: MlpState | None = None, *, reset: Tensor | None = None) -> LayerOut:  # noqa: ARG002
        return LayerOut(self._map(x), MlpState(), {})

    def step(self, x: Tensor, state: MlpState, *, reset: Tensor | None = None) -> tuple[Tensor, MlpState]:  # noqa: ARG002
        return self._map(x), state

    def _map(self, x: Tensor) -> Tensor:
        u: Tensor = self.in_proj(x)
        if self.activation == "swiglu":
            gate, hidden = u.chunk(2, -1)
            return self.out_proj(F.silu(gate) * hidden)
        return self.out_proj(F.gelu(u) if self.activation == "gelu" else F.relu(u))
