"""HAX: a state-space model joined by context-dependent sparse attention (arXiv 2507.00449)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import BranchedConfig, BranchedLayer, Dual, LayerConfig, LayerOut, SequenceLayer
from recollect.core.types import Aux, State
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.layers.sparse import SparseAttention
from recollect.layers.sparse_options import SparseOptions
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Pattern, Sink, Window, published_pattern


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
    class Config(SparseOptions, kind="hax"):
        """``SparseOptions`` for the attention, and how it joins ``mixer``, the recurrent layer's config of equal
        ``d_model``: any ``BranchedConfig`` in parallel, any layer at all in sequence.

        Presets: ``published``, ``published_language``, ``recommended``.
        """

        mixer: LayerConfig = field(default_factory=lambda: Mamba2.Config(64))
        arrangement: Literal["parallel", "sequence"] = "parallel"
        gate_init: float = 1.0
        written: bool = False
        """Values are what a selective mixer writes, dt u, in units of the layer's mean step, instead of u: what it
        passed over adds next to nothing. ``qk="dual"`` does so anyway."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.mixer.d_model != self.d_model:
                raise ConfigError(
                    f"{self.kind}: mixer.d_model {self.mixer.d_model} must equal d_model {self.d_model}; set both"
                )
            if self.arrangement not in ("parallel", "sequence"):
                raise ConfigError(f"{self.kind}: arrangement '{self.arrangement}' is not one of parallel, sequence")
            if self.arrangement == "parallel" and not isinstance(self.mixer, BranchedConfig):
                raise ConfigError(
                    f"{self.kind}: {self.mixer.kind} has no inner activations to branch from; use arrangement=sequence"
                )
            asked = "qk=dual" if self.qk == "dual" else "written=true" if self.written else ""
            if asked and not (self.arrangement == "parallel" and getattr(self.mixer, "dual", 0)):
                raise ConfigError(
                    f"{self.kind}: {asked} needs arrangement=parallel and a mixer with queries, keys and values of its "
                    f"own, mamba or mamba2, not {self.mixer.kind}"
                )
            _ = self.attention  # raises the attention's own ConfigErrors now rather than at build

        @property
        def attention(self) -> SparseAttention.Config:
            """The sparse attention that joins the mixer."""
            if self.arrangement == "parallel" and isinstance(self.mixer, BranchedConfig):
                read = 2 * self.mixer.dual if self.qk == "dual" else self.mixer.inner if self.written else 0
                return SparseAttention.Config(self.mixer.inner, project=False, d_read=read, **self.options())
            return SparseAttention.Config(self.d_model, **self.options())

        @classmethod
        def published(cls, d_model: int, mixer: LayerConfig | None = None, n_keys: int = 64) -> Self:
            """The paper's joint-recall setting (section 5.1 and the released configs), without the leaks of its code.

            Half of ``n_keys`` to each part; 8 sign bits, one round, planes redrawn at every training forward; the
            ranking loss with the summed target over as many keys as are kept; one head with keys as wide as the mixer's
            state, gate 1, values = inner activations, no positions, weights from N(0, 0.1). ``mixer`` None is the
            paper's Mamba-2 block: state 32, heads of 16. The loss's weight there is 0.1, the language model's default.

            Not taken over, as they read the future or are errors: centring and normalising along time, attention to
            everything where no key is allowed, new planes in evaluation, padding in the ranking target.
            """
            if mixer is None:
                mixer = Mamba2.Config(d_model, d_state=32, d_head=16, init_std=0.1)
            return cls._as_published(d_model, mixer, published_pattern("HAX", n_keys), init_std=0.1)

        @classmethod
        def published_language(cls, d_model: int, mixer: LayerConfig | None = None, n_keys: int = 128) -> Self:
            """The paper's language setting (section 5.2, appendix D.2): as ``published``, but 64 + 64 keys and buckets
            by argmax over 128 columns, in training redrawn and in evaluation one draw.

            ``mixer`` None is Mamba-2 at its public widths; the paper went on from trained Mamba-1 models, with queries
            and keys started from their C and B projections.
            """
            lsh, key_selection = published_pattern("HAX", n_keys)
            patterns = (replace(lsh, n_bits=7, rule="argmax"), key_selection)
            return cls._as_published(d_model, Mamba2.Config(d_model) if mixer is None else mixer, patterns)

        @classmethod
        def _as_published(
            cls, d_model: int, mixer: LayerConfig, patterns: tuple[Pattern, ...], init_std: float | None = None
        ) -> Self:
            return cls(
                d_model,
                mixer=mixer,
                arrangement=_arrangement(mixer),
                patterns=patterns,
                d_key=getattr(mixer, "d_state", 32),
                planes="redrawn",
                selection="ranking",
                selection_target="sum",
                samples=patterns[-1].budget,
                init_std=init_std,
            )

        @classmethod
        def recommended(cls, d_model: int, mixer: LayerConfig | None = None, *, gate_init: float = 3.0) -> Self:
            """What has worked best here on small tasks (``docs/log.md``); joined in parallel wherever the mixer allows.

            16 keys from the two nearest of 32 buckets and 16 selected ones; the hash has maps of its own, taught by
            queries of every training sequence that read everything. On joint recall of tables up to 8 x 8 this took
            HAX from 72 to 99 %, beside 100 % for full attention. Unit vectors and a gate of 3, so that attention is
            heard from the start: the plateau before it is learned is then short. Inside a world model set
            ``gate_init=0.1``: at 1 the branch first adds an average over keys that mean nothing yet, and the reward was
            missed. ``mixer`` None is Mamba-2.
            """
            mixer = Mamba2.Config(d_model) if mixer is None else mixer
            return cls(
                d_model,
                mixer=mixer,
                arrangement=_arrangement(mixer),
                patterns=(Lsh(16, n_bits=5, n_rounds=2, rule="argmax", rounds="probed"), KeySelection(16)),
                d_key=16,
                gate_init=gate_init,
                normalise="l2",
                learn_scale=True,
                planes="projected",
                explore=128,
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
                "mamba-dual": cls(
                    8, mixer=Mamba.Config.tiny(), patterns=hax, d_key=Mamba.Config.tiny().dual, qk="dual"
                ),
                "mamba2-follow": cls(
                    6,
                    mixer=Mamba2.Config(6, d_state=4, d_head=3),
                    patterns=hax,
                    d_key=4,
                    qk="shared",
                    span=3,
                    follow=True,
                    written=True,
                ),
                "mamba2-dual": cls(
                    6,
                    mixer=Mamba2.Config(6, d_state=4, d_head=3, n_groups=2),
                    patterns=hax,
                    d_key=4,
                    n_heads=2,
                    qk="dual",
                    normalise="l2",
                    learn_scale=True,
                    planes="projected",
                ),
                "s5-options": cls(
                    8,
                    mixer=S5.Config.tiny(),
                    patterns=hax,
                    d_key=4,
                    qk="shared",
                    normalise="l2",
                    include_self=True,
                    planes="learned",
                    selection="gate+ranking",
                ),
                "attention-sequence": cls(
                    8, mixer=Attention.Config.tiny(), patterns=(KeySelection(3),), d_key=4, arrangement="sequence"
                ),
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

            def branch(u: Tensor, dual: Callable[[], Dual] | None = None) -> Tensor:
                joined.append(self.attention(self._read(u, dual), before[1], reset=reset))
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

            def branch(u: Tensor, dual: Callable[[], Dual] | None = None) -> Tensor:
                attended, after = self.attention.step(self._read(u, dual), state.attention, reset=reset)
                joined.append(after)
                return attended * self.gate

            y, mixer = self.mixer.step(x, state.mixer, reset=reset, branch=branch)
            return y, self.State(mixer, joined[0])
        mixed, mixer = self.mixer.step(x, state.mixer, reset=reset)
        attended, attention = self.attention.step(mixed, state.attention, reset=reset)
        return mixed + attended * self.gate, self.State(mixer, attention)

    def _read(self, u: Tensor, dual: Callable[[], Dual] | None) -> Tensor:
        """What the attention is given: u; or the mixer's values, then what queries and keys are made from."""
        if self.config.qk != "dual" and not self.config.written:
            return u
        assert dual is not None
        own = dual()
        return torch.cat([own.values, *([own.queries, own.keys] if self.config.qk == "dual" else [u])], -1)


def _arrangement(mixer: LayerConfig) -> Literal["parallel", "sequence"]:
    return "parallel" if isinstance(mixer, BranchedConfig) else "sequence"
