"""The contract that every sequence layer obeys, and its laws.

A layer maps a sequence (B, L, D) to a sequence (B, L, D) and carries a **state**: what it remembers. It can be run over
many positions at once (``forward``, parallel in time) or over exactly one (``step``); both are the same function.

The laws hold for every entry of ``recollect.layers.LAYERS`` in every configuration its file declares, in float64 on a
CPU (``tests/test_layer_laws.py``). Adding a layer adds no test code.

1. *fold*: ``forward`` equals folding ``step``: outputs, final state, gradients of inputs and parameters.
2. *split*: ``forward(x[:k])`` then ``forward(x[k:], state)`` equals ``forward(x)``, for any k.
3. *reset*: a reset at t equals two independent sequences; it acts **before** x_t is consumed. Never ignored, in any
   mode.
4. *causal*: dy_t/dx_s is exactly zero for s > t, and changing a suffix leaves the prefix bit-identical. A layer that
   convolves by FFT declares ``causality = "rounding"`` and is held to 1e-12 instead.
5. *pure*: inputs and the incoming state are not written to; the same input twice gives the same output in eval mode.
6. *batch*: ``index_batch(state, idx)`` then ``step`` equals ``step`` then index. Rows do not affect one another.
7. *bounded*: ``nbytes(state)`` is what ``Config.state_bytes(...)`` declares: constant for recurrent layers, capped for
   windowed attention, and stated as a function of the positions seen where it must grow.

Padding is the caller's business, through losses that know a ``mask``. Several sequences in one row are packed with
``reset``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from recollect.core.config import Config
from recollect.core.errors import ConfigError
from recollect.core.types import Aux, State


class LayerOut(NamedTuple):
    """What ``forward`` returns: outputs y (B, L, D), the state after the last position, losses to add."""

    y: Tensor
    state: State
    aux: Aux


@dataclass(frozen=True)
class LayerConfig(Config, ABC):
    """Base of every layer's nested ``Config``; ``d_model`` is always the first field."""

    d_model: int

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ConfigError(f"{self.kind}: d_model must be at least 1, got {self.d_model}")

    @classmethod
    def tiny(cls) -> Self:
        """The smallest configuration that still exercises everything: for tests and smoke runs."""
        return cls(d_model=8)

    @classmethod
    def declared(cls) -> Mapping[str, Self]:
        """Named configurations under which the layer promises the laws; the tests run all of them."""
        return {"tiny": cls.tiny()}

    @abstractmethod
    def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
        """Bytes of the state for ``batch`` rows in compute dtype ``dtype`` after ``seen`` positions."""

    def build(self) -> SequenceLayer:
        """The layer this config describes."""
        return LAYER_CLASSES[type(self)](self)


@dataclass(frozen=True)
class BranchedConfig(LayerConfig):
    """Base of the configs of ``BranchedLayer``: mixers that another core can join."""

    @property
    def inner(self) -> int:
        """Width E of the inner activations; ``d_model`` unless the mixer expands."""
        return self.d_model

    @property
    def dual(self) -> int:
        """Width of the queries, and of the keys, that the core has itself and shows a ``Branch``; 0: it has none."""
        return 0


LAYER_CLASSES: dict[type[LayerConfig], type[SequenceLayer]] = {}


class SequenceLayer(nn.Module, ABC):
    """Base of every layer. Subclasses nest a frozen dataclass ``Config(LayerConfig, kind=...)`` and are built
    as ``cls(config)``. To build or call one in float16 on a CPU is a ConfigError.
    """

    Config: ClassVar[Any]
    causality: Literal["exact", "rounding"] = "exact"

    def __init__(self, *_config: Any) -> None:
        super().__init__()
        refuse_float16(torch.get_default_dtype(), torch.get_default_device(), type(self).__name__)
        self.register_forward_pre_hook(_refuse_float16_input)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            LAYER_CLASSES[cls.Config] = cls

    @abstractmethod
    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before anything was seen. ``device`` and ``dtype`` default to the parameters' own."""

    @abstractmethod
    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        """Outputs for x (B, L, D) from ``state`` (None: the initial state); ``reset`` (B, L) bool. Parallel over L."""

    @abstractmethod
    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Exactly one position: x (B, D), ``reset`` (B,) bool. Returns y (B, D) and the next state."""

    def state_like(self, x: Tensor) -> State:
        """The initial state for the rows, device and dtype of ``x`` (B, ...)."""
        return self.init_state(x.shape[0], device=x.device, dtype=x.dtype)


def refuse_float16(dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Raise ConfigError for float16 on a CPU, which has no arithmetic for it: hundreds of times slower than float32,
    and sums overflow at 65,504.
    """
    if dtype is torch.float16 and device.type == "cpu":
        raise ConfigError(f"{what}: float16 does not work on a CPU; use float32, or autocast to bfloat16")


def _refuse_float16_input(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    for x in inputs[:1]:
        refuse_float16(x.dtype, x.device, type(layer).__name__)
        if torch.is_autocast_enabled(x.device.type):
            refuse_float16(torch.get_autocast_dtype(x.device.type), x.device, f"{type(layer).__name__} under autocast")


class Dual(NamedTuple):
    """A selective state-space model's own queries, keys and values, as of attention (arXiv 2405.21060).

    y_i = sum over j <= i of decay_ij (C_i . B_j) dt_j u_j has the queries C and keys B, (B, L, D) or (B, D) each, D
    being ``BranchedConfig.dual``, and the values dt u, (B, L, E) or (B, E): what is written, and next to nothing where
    nothing is. dt is in units of the layer's mean step at no input, so that values are about as large as u.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


class Branch(Protocol):
    """From a mixer's inner activations u, (B, L, E) or (B, E), to what is added to its core's output, as large.

    ``dual``, if the core has one, makes its own queries, keys and values; not called, it costs nothing.
    """

    def __call__(self, u: Tensor, dual: Callable[[], Dual] | None = None) -> Tensor: ...


class BranchedLayer(SequenceLayer):
    """A mixer whose core can be joined by a second one in parallel, as HAX joins attention to an SSM.

    ``forward`` and ``step`` take ``branch``: it is called once with the core's inner input u, and what it returns is
    added to the core's output before the gate and the output projection. ``d_inner`` is the width E of both.
    """

    d_inner: int

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut: ...

    @abstractmethod
    def step(
        self, x: Tensor, state: State, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, State]: ...
