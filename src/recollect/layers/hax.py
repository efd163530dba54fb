"""HAX: a state-space model joined by context-dependent sparse attention (arXiv 2507.00449)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import BranchedConfig, BranchedLayer, LayerConfig, LayerOut, SequenceLayer
from recollect.core.types import Aux, State
from recollect.layers.gru import GRU
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.layers.sparse import SparseAttention
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Pattern, Sink, Window


class HAX(SequenceLayer):
    """Any recurrent mixer with sparse attention beside it, or after it.

    *parallel*, as published: both cores read the mixer's inner activations u (after its convolution); the attention's
    values are u itself; its output, times a learned vector E (``gate_init`` at first), is added to the core's output
    before the mixer's gate and output projection.

    *sequence*: y = s + E * attend(s) for the mixer's output s, the arrangement of the paper's theory.

    ``patterns`` may be any union; HAX proper is ``(Lsh, KeySelection)``. What differs from the published code: nothing
    reads the future, a query without keys gets zero, and it decodes with a bounded state.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="hax"):
        """``mixer`` is the config of the recurrent layer and must have the same ``d_model``."""

        mixer: LayerConfig = field(default_factory=lambda: Mamba2.Config(64))
        patterns: tuple[Pattern, ...] = (Lsh(32, n_bits=8), KeySelection(32))
        arrangement: Literal["parallel", "sequence"] = "parallel"
        d_key: int = 32
        n_heads: int = 1
        gate_init: float = 1.0
        selection_target: Literal["mean", "sum"] = "mean"
        init_std: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.mixer.d_model != self.d_model:
                raise ConfigError(
                    f"{self.kind}: mixer.d_model {self.mixer.d_model} must equal d_model {self.d_model}; set both"
                )
            if self.arrangement == "parallel" and not isinstance(self.mixer, BranchedConfig):
                raise ConfigError(
                    f"{self.kind}: {self.mixer.kind} has no inner activations to branch from; use arrangement=sequence"
                )
            _ = self.attention  # raises the attention's own ConfigErrors now rather than at build

        @property
        def attention(self) -> SparseAttention.Config:
            """The sparse attention that joins the mixer."""
            parallel = self.arrangement == "parallel"
            return SparseAttention.Config(
                d_model=self.mixer.inner if parallel and isinstance(self.mixer, BranchedConfig) else self.d_model,
                d_key=self.d_key,
                n_heads=self.n_heads,
                patterns=self.patterns,
                project=not parallel,
                selection_target=self.selection_target,
                init_std=self.init_std,
            )

        @classmethod
        def tiny(cls) -> Self:
            return cls(8, mixer=Mamba2.Config.tiny(), patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=4)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            fixed = (Window(3), Sink(2), Dilated(2, stride=5))
            hax = (Lsh(4, n_bits=2, n_rounds=2), KeySelection(3))
            return {
                "tiny": cls.tiny(),
                "mamba2-full": cls(8, mixer=Mamba2.Config.tiny(), patterns=(Full(),), d_key=4),
                "s5-fixed-heads": cls(8, mixer=S5.Config.tiny(), patterns=fixed, d_key=4, n_heads=2),
                "gru-hax": cls(8, mixer=GRU.Config.tiny(), patterns=hax, d_key=4),
                "mamba2-sequence": cls(
                    8, mixer=Mamba2.Config.tiny(), patterns=hax, d_key=4, arrangement="sequence", gate_init=0.5
                ),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """The mixer's state and the attention's memory."""
            parts = (self.mixer, self.attention)
            return sum(part.state_bytes(batch, dtype=dtype, seen=seen) for part in parts)

    class State(NamedTuple):
        """The states of both cores."""

        mixer: State
        attention: SparseAttention.State

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.mixer = config.mixer.build()
        self.attention = SparseAttention(config.attention)
        self.gate = nn.Parameter(torch.full((config.attention.d_model,), config.gate_init))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        mixer = self.mixer.init_state(batch, device=device, dtype=dtype)
        return self.State(mixer, self.attention.init_state(batch, device=device, dtype=dtype))

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        before = (None, None) if state is None else state
        if isinstance(self.mixer, BranchedLayer) and self.config.arrangement == "parallel":
            joined: list[LayerOut] = []

            def branch(u: Tensor) -> Tensor:
                joined.append(self.attention(u, before[1], reset=reset))
                return joined[0].y * self.gate

            mixed = self.mixer(x, before[0], reset=reset, branch=branch)
            y, attended = mixed.y, joined[0]
        else:
            mixed = self.mixer(x, before[0], reset=reset)
            attended = self.attention(mixed.y, before[1], reset=reset)
            y = mixed.y + attended.y * self.gate
        aux: Aux = {**mixed.aux, **attended.aux}
        return LayerOut(y, self.State(mixed.state, attended.state), aux)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if isinstance(self.mixer, BranchedLayer) and self.config.arrangement == "parallel":
            joined: list[SparseAttention.State] = []

            def branch(u: Tensor) -> Tensor:
                attended, after = self.attention.step(u, state.attention, reset=reset)
                joined.append(after)
                return attended * self.gate

            y, mixer = self.mixer.step(x, state.mixer, reset=reset, branch=branch)
            return y, self.State(mixer, joined[0])
        mixed, mixer = self.mixer.step(x, state.mixer, reset=reset)
        attended, attention = self.attention.step(mixed, state.attention, reset=reset)
        return mixed + attended * self.gate, self.State(mixer, attention)
