"""Mamba-2 (arXiv 2405.21060): input-dependent scalar decay per head, run as a state-space dual."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, Dual, LayerOut
from recollect.core.state import where_reset
from recollect.ops.conv import causal_conv
from recollect.ops.gate import gated_rms_norm
from recollect.ops.projection import split_linear
from recollect.ops.scan import accumulator_dtype
from recollect.ops.ssd import ssd, ssd_step

NORM_EPS = 1e-5


class Mamba2State(NamedTuple):
    """The last ``d_conv - 1`` inputs of the convolution (B, W-1, E + 2GN), and the SSM state (B, H, P, N)."""

    conv: Tensor
    ssm: Tensor


class Mamba2(BranchedLayer):
    """[z, xBC, dt] = W x; x, B, C = SiLU(conv(xBC)); y = SSD(x, softplus(dt + bias), A, B, C) + D x;
    output = W_o RMSNorm(y * SiLU(z)), the norm over the channels of each group.

    Parameters carry the names of the public checkpoints. O(L (Q + N) E) time with chunks of Q; E N reals of state per
    row, kept in at least float32, and the convolution's window.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="mamba2"):
        """``d_inner = expand * d_model`` in heads of ``d_head``; ``n_groups`` sets of B and C are shared by the heads.

        ``d_conv = 0`` leaves the convolution out. Step sizes start log-uniform in [dt_min, dt_max]. ``init_std`` draws
        both projections from a normal distribution; None keeps PyTorch's initialisation.
        """

        d_state: int = 64
        d_head: int = 64
        expand: int = 2
        n_groups: int = 1
        d_conv: int = 4
        chunk_size: int = 64
        dt_min: float = 1e-3
        dt_max: float = 0.1
        init_std: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("d_state", "d_head", "expand", "n_groups", "chunk_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"mamba2: {name} must be at least 1, got {getattr(self, name)}")
            if self.d_conv < 0:
                raise ConfigError(f"mamba2: d_conv must be 0 (no convolution) or more, got {self.d_conv}")
            if self.d_inner % self.d_head:
                raise ConfigError(
                    f"mamba2: d_inner = expand * d_model = {self.d_inner} is not divisible by d_head {self.d_head}"
                )
            if self.n_heads % self.n_groups:
                raise ConfigError(f"mamba2: {self.n_heads} heads are not divisible by n_groups {self.n_groups}")
            if not 0 < self.dt_min <= self.dt_max:
                raise ConfigError(f"mamba2: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")
            if self.init_std is not None and self.init_std <= 0:
                raise ConfigError(f"mamba2: init_std must be positive or null, got {self.init_std}")

        @property
        def inner(self) -> int:
            return self.d_inner

        @property
        def dual(self) -> int:
            return self.n_groups * self.d_state

        @property
        def d_inner(self) -> int:
            """Width of the inner activations, E."""
            return self.expand * self.d_model

        @property
        def n_heads(self) -> int:
            """Heads, H."""
            return self.d_inner // self.d_head

        @property
        def conv_width(self) -> int:
            """Channels of the convolution: x, B and C."""
            return self.d_inner + 2 * self.n_groups * self.d_state

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_state=4, d_head=4, chunk_size=16)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "groups": cls(d_model=6, d_state=5, d_head=3, n_groups=2, d_conv=3),
                "no_conv": cls(d_model=4, d_state=6, d_head=8, expand=4, d_conv=0, chunk_size=32, init_std=0.3),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            window = max(self.d_conv - 1, 0) * self.conv_width * dtype.itemsize
            return batch * (window + self.d_inner * self.d_state * accumulator_dtype(dtype).itemsize)

    def __init__(self, config: Mamba2.Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.d_inner
        self.in_proj = nn.Linear(config.d_model, config.d_inner + config.conv_width + config.n_heads, bias=False)
        width = config.conv_width
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width) if config.d_conv else None
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        # A step below 1e-4 would start with a dead gradient; the floor is the reference implementation's.
        dt = torch.exp(low + (high - low) * torch.rand(config.n_heads)).clamp_min(1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(1 + 15 * torch.rand(config.n_heads)))
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.norm = nn.RMSNorm(config.d_inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        if config.init_std is not None:
            nn.init.normal_(self.in_proj.weight, std=config.init_std)
            nn.init.normal_(self.out_proj.weight, std=config.init_std)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """Zero: nothing in the window, nothing remembered."""
        config, like = self.config, self.out_proj.weight
        device, dtype = device or like.device, dtype or like.dtype
        conv = self._empty_window(torch.empty(batch, 0, device=device, dtype=dtype))
        size = (batch, config.n_heads, config.d_head, config.d_state)
        return Mamba2State(conv, torch.zeros(size, device=device, dtype=accumulator_dtype(dtype)))

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        config = self.config
        window = self._empty_window(x) if state is None else state.conv
        z_BLE, u_BLE, B_BLGN, C_BLGN, dt_BLH, window = self._inputs(x, window, reset)
        y_BLHP, ssm = ssd(
            u_BLE.unflatten(-1, (config.n_heads, config.d_head)),
            dt_BLH,
            -torch.exp(self.A_log.to(dt_BLH.dtype)),
            B_BLGN,
            C_BLGN,
            self.D,
            h_init=None if state is None else state.ssm,
            reset=reset,
            chunk_size=config.chunk_size,
        )
        dual = partial(self._dual, C_BLGN, B_BLGN, dt_BLH, u_BLE)
        return LayerOut(self._emit(y_BLHP, u_BLE, z_BLE, dual, branch), Mamba2State(window, ssm), {})

    def step(
        self, x: Tensor, state: Mamba2State, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, Mamba2State]:
        config = self.config
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        *activations, window = self._inputs(x.unsqueeze(1), state.conv, None)
        z_BE, u_BE, B_BGN, C_BGN, dt_BH = (t.squeeze(1) for t in activations)
        A_H = -torch.exp(self.A_log.to(state.ssm.dtype))
        x_BHP = u_BE.unflatten(-1, (config.n_heads, config.d_head))
        y_BHP, ssm = ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, self.D, state.ssm)
        dual = partial(self._dual, C_BGN, B_BGN, dt_BH, u_BE)
        return self._emit(y_BHP, u_BE, z_BE, dual, branch), Mamba2State(window, ssm)

    def _empty_window(self, like: Tensor) -> Tensor:
        """The convolution's window before anything was seen, for the rows of ``like`` (B, ...)."""
        return like.new_zeros(len(like), max(self.config.d_conv - 1, 0), self.config.conv_width)

    def _inputs(self, x: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
        """z, u, B, C, dt and the convolution's next window."""
        config = self.config
        width = 2 * config.n_groups * config.d_state
        sizes = (config.d_inner, config.d_inner, width, config.n_heads)
        z, u, keys_and_queries, dt = split_linear(x, self.in_proj.weight, sizes)
        u, window_u = self._convolve(u, window, slice(0, config.d_inner), reset)
        BC, window_BC = self._convolve(keys_and_queries, window, slice(config.d_inner, None), reset)
        B, C = BC.unflatten(-1, (2 * config.n_groups, config.d_state)).chunk(2, -2)
        dt = F.softplus(dt.to(accumulator_dtype(dt.dtype)) + self.dt_bias)
        return z, u, B, C, dt, torch.cat([window_u, window_BC], -1)

    def _convolve(self, x: Tensor, window: Tensor, part: slice, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution of the channels ``part``; the convolution is depthwise, so they need no others."""
        window = window[..., part]
        if self.conv1d is None:
            return F.silu(x), window
        assert self.conv1d.bias is not None
        weight, bias = self.conv1d.weight.squeeze(1)[part], self.conv1d.bias[part]
        return causal_conv(x, weight, bias, window, reset=reset, silu=True, wide=True)

    def _dual(self, C: Tensor, B: Tensor, dt: Tensor, u: Tensor) -> Dual:
        steps = dt / F.softplus(self.dt_bias.to(dt.dtype)).mean()
        values = u.unflatten(-1, (self.config.n_heads, -1)) * steps[..., None].to(u.dtype)
        dtype = self.out_proj.weight.dtype
        return Dual(*(part.flatten(-2).to(dtype) for part in (C, B, values)))

    def _emit(self, y_heads: Tensor, u: Tensor, z: Tensor, dual: Callable[[], Dual], branch: Branch | None) -> Tensor:
        y = y_heads.flatten(-2)
        if branch is not None:
            y = y + branch(u.to(z.dtype), dual)
        groups = self.config.n_groups
        return self.out_proj(gated_rms_norm(y, z, self.norm.weight, n_groups=groups, eps=NORM_EPS))
