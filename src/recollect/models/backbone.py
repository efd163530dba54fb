"""A residual stack of sequence layers that is itself a sequence layer, and the orders of layers that papers use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from recollect.layers.mlp import Mlp
from recollect.layers.s5 import S5

Norm = Literal["rms", "layer"]
Activation = Literal["gelu", "swiglu", "relu"]


class Backbone(SequenceLayer):
    """Pre-norm residual sub-layers, x <- x + layer(norm(x)) for every layer in order, mixers and MLPs alike; last a
    norm.

    Its state is the tuple of its layers' states, and it obeys every law they obey. Losses that layers add under one
    name are summed over layers.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="backbone"):
        """``layers`` in order from the input; each has the backbone's ``d_model``.

        A block order is nothing but this tuple; ``alternating``, ``s4_blocks`` and ``samba`` write the usual ones.
        ``reads`` is what the last norm sees: the ``last`` layer's output, or a linear map of the outputs of ``all``
        layers side by side, as TransDreamer (arXiv 2202.09481) reads its Transformer.
        """

        layers: tuple[LayerConfig, ...] = ()
        norm: Norm = "rms"
        reads: Literal["last", "all"] = "last"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.layers:
                raise ConfigError("backbone: layers is empty; give at least one layer config")
            if self.reads not in ("last", "all"):
                raise ConfigError(f"backbone: reads must be 'last' or 'all', got '{self.reads}'")
            for i, layer in enumerate(self.layers):
                if layer.d_model != self.d_model:
                    raise ConfigError(
                        f"backbone: layers.{i}.d_model {layer.d_model} must equal d_model {self.d_model}; set both"
                    )

        @classmethod
        def alternating(
            cls,
            d_model: int,
            mixers: Iterable[LayerConfig],
            mlp_expand: float = 2.0,
            *,
            activation: Activation = "gelu",
            norm: Norm = "rms",
        ) -> Self:
            """Every mixer followed by an MLP, as in Transformers; 0 for ``mlp_expand`` leaves the MLPs out."""
            mlp = _mlps(d_model, mlp_expand, activation)
            return cls(d_model, tuple(layer for mixer in mixers for layer in (mixer, *mlp)), norm)

        @classmethod
        def s4_blocks(
            cls,
            mixer: LayerConfig,
            n_blocks: int,
            mlp_expand: float = 2.0,
            *,
            activation: Activation = "gelu",
            norm: Norm = "layer",
        ) -> Self:
            """The blocks of S4WM (arXiv 2307.02064, its figure): twice u + Linear(S4(LayerNorm u)), then
            u + MLP(LayerNorm u). The linear map is the mixer's own output projection, which every mixer here has.
            """
            block = (mixer, mixer, *_mlps(mixer.d_model, mlp_expand, activation))
            return cls(mixer.d_model, block * _blocks(n_blocks), norm)

        @classmethod
        def samba(
            cls,
            mamba: LayerConfig,
            attention: LayerConfig,
            n_blocks: int,
            mlp_expand: float = 4.0,
            *,
            activation: Activation = "swiglu",
            norm: Norm = "rms",
        ) -> Self:
            """The blocks of Samba (arXiv 2406.07522): Mamba, MLP, sliding-window attention, MLP. 0 for ``mlp_expand``
            leaves the MLPs out: two such blocks are the four layers of HAX's baseline (arXiv 2507.00449).
            """
            mlp = _mlps(mamba.d_model, mlp_expand, activation)
            return cls(mamba.d_model, (mamba, *mlp, attention, *mlp) * _blocks(n_blocks), norm)

        @classmethod
        def tiny(cls) -> Self:
            return cls(8, layers=(Mamba2.Config.tiny(), Mamba2.Config.tiny()))

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            mixed = (GRU.Config.tiny(), HAX.Config.tiny(), Attention.Config.tiny())
            return {
                "tiny": cls.tiny(),
                "mixed": cls.alternating(8, mixed, norm="layer"),
                "s4-blocks": cls.s4_blocks(S5.Config.tiny(), 1),
                "all-layers": cls(8, (GRU.Config.tiny(), Mamba2.Config.tiny()), reads="all"),
                "samba": cls.samba(Mamba2.Config.tiny(), Attention.Config.tiny(), 1),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """The sum over layers."""
            return sum(layer.state_bytes(batch, dtype=dtype, seen=seen) for layer in self.layers)

    class State(NamedTuple):
        """One state per layer."""

        layers: tuple[State, ...]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layer.build() for layer in config.layers)
        self.norms = nn.ModuleList(_norm(config) for _ in config.layers)
        wide = config.d_model * len(config.layers)
        self.read_all = nn.Linear(wide, config.d_model) if config.reads == "all" else None
        self.last_norm = _norm(config)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return self.State(tuple(m.init_state(batch, device=device, dtype=dtype) for m in self._sublayers()))

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        states: list[State] = []
        outputs: list[Tensor] = []
        aux: Aux = {}
        for i, layer in enumerate(self._sublayers()):
            out = layer(self.norms[i](x), None if state is None else state.layers[i], reset=reset)
            x = x + out.y
            outputs.append(x)
            states.append(out.state)
            for name, value in out.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        return LayerOut(self._read(outputs), self.State(tuple(states)), aux)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        states: list[State] = []
        outputs: list[Tensor] = []
        for i, layer in enumerate(self._sublayers()):
            y, after = layer.step(self.norms[i](x), state.layers[i], reset=reset)
            x = x + y
            outputs.append(x)
            states.append(after)
        return self._read(outputs), self.State(tuple(states))

    def _read(self, outputs: list[Tensor]) -> Tensor:
        """The backbone's output from those of its layers."""
        return self.last_norm(outputs[-1] if self.read_all is None else self.read_all(torch.cat(outputs, -1)))

    def _sublayers(self) -> list[SequenceLayer]:
        return [layer for layer in self.layers if isinstance(layer, SequenceLayer)]


def _norm(config: Backbone.Config) -> nn.Module:
    return nn.RMSNorm(config.d_model, eps=1e-5) if config.norm == "rms" else nn.LayerNorm(config.d_model)


def _mlps(d_model: int, expand: float, activation: Activation) -> tuple[LayerConfig, ...]:
    """One MLP, or none if ``expand`` is 0."""
    return (Mlp.Config(d_model, expand=expand, activation=activation),) if expand else ()


def _blocks(n_blocks: int) -> int:
    if n_blocks < 1:
        raise ConfigError(f"backbone: n_blocks must be at least 1, got {n_blocks}")
    return n_blocks
