"""A residual stack of sequence layers that is itself a sequence layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.core.types import Aux, State
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2


class Backbone(SequenceLayer):
    """Pre-norm residual blocks: x <- x + mixer(norm(x)), then x <- x + mlp(norm(x)) if ``mlp_expand`` is above 0;
    last a norm.

    Its state is the tuple of its layers' states, and it obeys every law they obey. Losses that layers add under one
    name are summed over layers.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="backbone"):
        """``layers`` in order from the input; each has the backbone's ``d_model``."""

        layers: tuple[LayerConfig, ...] = ()
        mlp_expand: float = 0.0
        norm: Literal["rms", "layer"] = "rms"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.layers:
                raise ConfigError("backbone: layers is empty; give at least one layer config")
            for i, layer in enumerate(self.layers):
                if layer.d_model != self.d_model:
                    raise ConfigError(
                        f"backbone: layers.{i}.d_model {layer.d_model} must equal d_model {self.d_model}; set both"
                    )
            if self.mlp_expand < 0:
                raise ConfigError(f"backbone: mlp_expand must be 0 (no MLP) or more, got {self.mlp_expand}")

        @classmethod
        def tiny(cls) -> Self:
            return cls(8, layers=(Mamba2.Config.tiny(), Mamba2.Config.tiny()))

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            mixed = (GRU.Config.tiny(), HAX.Config.tiny(), Attention.Config.tiny())
            return {"tiny": cls.tiny(), "mixed": cls(8, layers=mixed, mlp_expand=2.0, norm="layer")}

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """The sum over layers."""
            return sum(layer.state_bytes(batch, dtype=dtype, seen=seen) for layer in self.layers)

    class State(NamedTuple):
        """One state per layer."""

        layers: tuple[State, ...]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.mixers = nn.ModuleList(layer.build() for layer in config.layers)
        self.norms = nn.ModuleList(_norm(config) for _ in config.layers)
        self.mlps = nn.ModuleList(_Mlp(config) for _ in config.layers) if config.mlp_expand else None
        self.last_norm = _norm(config)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return self.State(tuple(m.init_state(batch, device=device, dtype=dtype) for m in self._mixers()))

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        states: list[State] = []
        aux: Aux = {}
        for i, mixer in enumerate(self._mixers()):
            out = mixer(self.norms[i](x), None if state is None else state.layers[i], reset=reset)
            x = self._add_mlp(i, x + out.y)
            states.append(out.state)
            for name, value in out.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        return LayerOut(self.last_norm(x), self.State(tuple(states)), aux)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        states: list[State] = []
        for i, mixer in enumerate(self._mixers()):
            y, after = mixer.step(self.norms[i](x), state.layers[i], reset=reset)
            x = self._add_mlp(i, x + y)
            states.append(after)
        return self.last_norm(x), self.State(tuple(states))

    def _add_mlp(self, i: int, x: Tensor) -> Tensor:
        return x if self.mlps is None else x + self.mlps[i](x)

    def _mixers(self) -> list[SequenceLayer]:
        return [m for m in self.mixers if isinstance(m, SequenceLayer)]


def _norm(config: Backbone.Config) -> nn.Module:
    return nn.RMSNorm(config.d_model, eps=1e-5) if config.norm == "rms" else nn.LayerNorm(config.d_model)


class _Mlp(nn.Sequential):
    """norm -> linear -> GELU -> linear."""

    def __init__(self, config: Backbone.Config) -> None:
        hidden = max(1, round(config.d_model * config.mlp_expand))
        super().__init__(_norm(config), nn.Linear(config.d_model, hidden), nn.GELU(), nn.Linear(hidden, config.d_model))
