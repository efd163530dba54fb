"""What S4, S4D and DSS share: one independent state-space model per channel, then GELU and a gated linear unit."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.derived import Derived
from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.scan import accumulator_dtype


class ChannelState(NamedTuple):
    """The complex states of every channel, one of every conjugate pair, as real and imaginary parts: (B, D, N/2, 2)."""

    h: Tensor


@dataclass(frozen=True)
class ChannelConfig(BranchedConfig):
    """``d_state`` is per channel and counts both of every conjugate pair. Step sizes start log-uniform."""

    d_state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 0.1
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_state < 2 or self.d_state % 2:
            raise ConfigError(f"{self.kind}: d_state must be even and at least 2, got {self.d_state}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"{self.kind}: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")
        if self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            raise ConfigError(f"{self.kind}: chunk_size must be a power of two, got {self.chunk_size}")

    @classmethod
    def tiny(cls) -> Self:
        return cls(d_model=6, d_state=8, chunk_size=16)

    def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
        return batch * self.d_model * self.d_state * accumulator_dtype(dtype).itemsize


class ChannelSSM(BranchedLayer):
    """y = SSM(u) + D u (+ branch), then GELU and Linear(D, 2 D) with a gate; subclasses say what the SSM is.

    D N reals of state per row, kept in at least float32.
    """

    def __init__(self, config: ChannelConfig) -> None:
        super().__init__()
        self.d_inner = config.d_model
        self.n_pairs = config.d_state // 2
        self.chunk_size = config.chunk_size
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(config.d_model))
        self.C = nn.Parameter(torch.randn(config.d_model, self.n_pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(config.d_model))
        self.out_proj = nn.Linear(config.d_model, 2 * config.d_model)
        self.stepped: Derived[Any] = Derived()

    @abstractmethod
    def system(self, dtype: torch.dtype) -> Any:
        """The discretised system from the parameters, taken in float64 and rounded once to complex ``dtype``."""

    @abstractmethod
    def run(self, x: Tensor, h: Tensor, system: Any, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (B, L, D) and the last state (B, D, P, 2)."""

    @abstractmethod
    def run_step(self, x: Tensor, h: Tensor, system: Any) -> tuple[Tensor, Tensor]:
        """y (B, D) and the next state; h is complex (B, D, P)."""

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ChannelState:
        """Zero: nothing remembered."""
        dtype, device = accumulator_dtype(dtype or self.log_dt.dtype), device or self.log_dt.device
        return ChannelState(torch.zeros(batch, self.d_inner, self.n_pairs, 2, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, state: ChannelState | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        start: Tensor = (self.state_like(x) if state is None else state).h
        y, h = self.run(x.to(start.dtype), start, self.system(start.dtype.to_complex()), reset)
        return LayerOut(self._emit(y, x, branch), ChannelState(h), {})

    def step(
        self, x: Tensor, state: ChannelState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, ChannelState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        dtype = state.h.dtype
        h = torch.view_as_complex(state.h.contiguous())
        system = self.stepped.of(dtype, lambda: self.system(dtype.to_complex()))
        y, h = self.run_step(x.to(dtype), h, system)
        return self._emit(y, x, branch), ChannelState(torch.view_as_real(h))

    def _emit(self, y: Tensor, x: Tensor, branch: Branch | None) -> Tensor:
        y = y.to(x.dtype)
        if branch is not None:
            y = y + branch(x)
        return F.glu(self.out_proj(F.gelu(y)), -1)


def per_channel(values_P: Tensor, d_model: int, dtype: torch.dtype | None = None) -> Tensor:
    """The same values for every channel, to become a parameter: (D, P, ...)."""
    repeated = values_P.expand(d_model, *values_P.shape)
    return repeated.to(dtype or torch.get_default_dtype()).contiguous()


def as_complex128(pairs: Tensor) -> Tensor:
    """Real and imaginary parts (..., 2) as one number each."""
    return torch.view_as_complex(pairs.double())
