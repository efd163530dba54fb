"""Gated DeltaNet (arXiv 2412.06464): a matrix memory that overwrites what a key held, with a decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.conv import causal_conv
from recollect.ops.delta_rule import delta_rule, delta_rule_step
from recollect.ops.scan import accumulator_dtype

NORM_EPS = 1e-6


class GatedDeltaNetState(NamedTuple):
    """The last ``d_conv - 1`` inputs of the convolution (B, W-1, 2 H N + E), and the memory (B, H, P, N)."""

    conv: Tensor
    memory: Tensor


class GatedDeltaNet(BranchedLayer):
    """q, k, v = SiLU(conv(W x)); q, k to unit length; y = the gated delta rule over them;
    output = W_o (RMSNorm_head(y) * SiLU(W_g x)).

    log alpha = -exp(A_log) softplus(W_a x + dt_bias) as in Mamba-2, and beta = sigmoid(W_b x). A branch reads the
    values after the convolution and is added to y. O(L N E) time; N E reals of state per row, kept in at least float32,
    and the convolution's window.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="gated_deltanet"):
        """``n_heads`` memories of ``d_value`` x ``d_head`` (keys); the inner width is ``n_heads * d_value``.

        ``d_conv = 0`` leaves the convolution out. ``allow_negative_eigenvalues`` doubles beta, to (0, 2): a key may
        then flip what it held, which tracking a state needs (arXiv 2411.12537). Step sizes softplus(dt_bias) start
        log-uniform in [dt_min, dt_max]. ``chunk_size`` matters where chunks are used, as on a GPU.
        """

        n_heads: int = 4
        d_head: int = 64
        d_value: int = 64
        d_conv: int = 4
        chunk_size: int = 64
        allow_negative_eigenvalues: bool = False
        dt_min: float = 1e-3
        dt_max: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("n_heads", "d_head", "d_value", "chunk_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
            if self.d_conv < 0:
                raise ConfigError(f"{self.kind}: d_conv must be 0 (no convolution) or more, got {self.d_conv}")
            if not 0 < self.dt_min <= self.dt_max:
                raise ConfigError(
                    f"{self.kind}: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}"
                )

        @property
        def inner(self) -> int:
            return self.n_heads * self.d_value

        @property
        def conv_width(self) -> int:
            """Channels of the convolution: q, k and v."""
            return 2 * self.n_heads * self.d_head + self.inner

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, n_heads=2, d_head=4, d_value=4, chunk_size=16)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "wide_values": cls(d_model=6, n_heads=3, d_head=2, d_value=5, d_conv=2, chunk_size=7),
                "no_conv": cls(
                    d_model=4, n_heads=1, d_head=6, d_value=3, d_conv=0, allow_negative_eigenvalues=True, dt_max=1.0
                ),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            window = max(self.d_conv - 1, 0) * self.conv_width * dtype.itemsize
            return batch * (window + self.inner * self.d_head * accumulator_dtype(dtype).itemsize)

    def __init__(self, config: GatedDeltaNet.Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.inner
        width = config.conv_width
        self.in_proj = nn.Linear(config.d_model, width + config.inner + 2 * config.n_heads, bias=False)
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width) if config.d_conv else None
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(low + (high - low) * torch.rand(config.n_heads))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(1 + 15 * torch.rand(config.n_heads)))
        self.norm = nn.RMSNorm(config.d_value, eps=1e-5)
        self.out_proj = nn.Linear(config.inner, config.d_model, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedDeltaNetState:
        """Zero: nothing in the window, nothing remembered."""
        config, like = self.config, self.out_proj.weight
        device, dtype = device or like.device, dtype or like.dtype
        conv = torch.zeros(batch, max(config.d_conv - 1, 0), config.conv_width, device=device, dtype=dtype)
        size = (batch, config.n_heads, config.d_value, config.d_head)
        return GatedDeltaNetState(conv, torch.zeros(size, device=device, dtype=accumulator_dtype(dtype)))

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaNetState | None = None,
        *,
        reset: Tensor | None = None,
        branch: Branch | None = None,
    ) -> LayerOut:
        before: GatedDeltaNetState = self.state_like(x) if state is None else state
        qkv, gate, log_alpha, beta = self._project(x)
        qkv, window = self._convolve(qkv, before.conv, reset)
        q, k, v, u = self._split(qkv)
        y, memory = delta_rule(
            q, k, v, log_alpha, beta, h_init=before.memory, reset=reset, chunk_size=self.config.chunk_size
        )
        return LayerOut(self._emit(y, u, gate, branch), GatedDeltaNetState(window, memory), {})

    def step(
        self, x: Tensor, state: GatedDeltaNetState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, GatedDeltaNetState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        qkv, gate, log_alpha, beta = self._project(x)
        qkv, window = self._convolve(qkv.unsqueeze(1), state.conv, None)
        q, k, v, u = self._split(qkv.squeeze(1))
        y, memory = delta_rule_step(q, k, v, log_alpha, beta, state.memory)
        return self._emit(y, u, gate, branch), GatedDeltaNetState(window, memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels of the convolution, gate, log alpha and beta."""
        config = self.config
        sizes = [config.conv_width, config.inner, config.n_heads, config.n_heads]
        qkv, gate, a, b = self.in_proj(x).split(sizes, -1)
        dtype = accumulator_dtype(a.dtype)
        log_alpha = -torch.exp(self.A_log.to(dtype)) * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        beta = torch.sigmoid(b.to(dtype))
        return qkv, gate, log_alpha, 2 * beta if config.allow_negative_eigenvalues else beta

    def _convolve(self, qkv: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conv1d is not None:
            assert self.conv1d.bias is not None
            qkv, window = causal_conv(qkv, self.conv1d.weight.squeeze(1), self.conv1d.bias, window, reset=reset)
        return F.silu(qkv), window

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k of unit length and v by heads, and v as it is."""
        config = self.config
        keys = config.n_heads * config.d_head
        qk, u = qkv.split([2 * keys, config.inner], -1)
        qk = qk.to(accumulator_dtype(qk.dtype)).unflatten(-1, (2, config.n_heads, config.d_head))
        q, k = (qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + NORM_EPS)).unbind(-3)
        return q, k, u.unflatten(-1, (config.n_heads, config.d_value)), u

    def _emit(self, y_heads: Tensor, u: Tensor, gate: Tensor, branch: Branch | None) -> Tensor:
        if branch is not None:
            y_heads = y_heads + branch(u).unflatten(-1, y_heads.shape[-2:])
        y = self.norm(y_heads.to(self.norm.weight.dtype)).flatten(-2).to(u.dtype)
        return self.out_proj(y * F.silu(gate))
