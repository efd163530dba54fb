"""Mamba (arXiv 2312.00752): a diagonal state-space model per channel with step, input and output from the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, Dual, LayerOut
from recollect.core.state import where_reset
from recollect.ops.conv import causal_conv
from recollect.ops.gate import gated
from recollect.ops.projection import split_linear
from recollect.ops.scan import accumulator_dtype
from recollect.ops.selective_scan import selective_scan, selective_step


class MambaState(NamedTuple):
    """The last ``d_conv - 1`` inputs of the convolution (B, W-1, E), and the SSM state (B, E, N)."""

    conv: Tensor
    ssm: Tensor


class Mamba(BranchedLayer):
    """[x, z] = W x; u = SiLU(conv(x)); [dt, B, C] = W_x u; y = scan(u, softplus(W_dt dt + b), A, B, C) + D u;
    output = W_o (y * SiLU(z)).

    Parameters carry the names of the public checkpoints. Sequential in time, O(L E N) time; E N reals of state per row,
    kept in at least float32, and the convolution's window.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="mamba"):
        """``d_inner = expand * d_model`` channels with ``d_state`` numbers each. ``dt_rank`` is the width of the step
        sizes before they are expanded to the channels, None for ``d_model / 16`` rounded up.

        ``d_conv = 0`` leaves the convolution out. Step sizes start log-uniform in [dt_min, dt_max]; their projection is
        ``dt_scale / sqrt(dt_rank)`` everywhere (``dt_init = "constant"``) or uniform between minus and plus that.
        ``init_std`` draws the other projections from a normal distribution; None keeps PyTorch's initialisation.
        """

        d_state: int = 16
        d_conv: int = 4
        expand: int = 2
        dt_rank: int | None = None
        dt_min: float = 1e-3
        dt_max: float = 0.1
        dt_init: Literal["random", "constant"] = "random"
        dt_scale: float = 1.0
        conv_bias: bool = True
        init_std: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("d_state", "expand"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"mamba: {name} must be at least 1, got {getattr(self, name)}")
            if self.d_conv < 0:
                raise ConfigError(f"mamba: d_conv must be 0 (no convolution) or more, got {self.d_conv}")
            if self.dt_rank is not None and self.dt_rank < 1:
                raise ConfigError(f"mamba: dt_rank must be at least 1, or null for d_model / 16, got {self.dt_rank}")
            if not 0 < self.dt_min <= self.dt_max:
                raise ConfigError(f"mamba: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")
            if self.dt_scale <= 0:
                raise ConfigError(f"mamba: dt_scale must be positive, got {self.dt_scale}")
            if self.init_std is not None and self.init_std <= 0:
                raise ConfigError(f"mamba: init_std must be positive or null, got {self.init_std}")

        @property
        def inner(self) -> int:
            return self.d_inner

        @property
        def dual(self) -> int:
            return self.d_state

        @property
        def d_inner(self) -> int:
            """Width of the inner activations, E."""
            return self.expand * self.d_model

        @property
        def rank(self) -> int:
            """``dt_rank``, or what None stands for."""
            return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_state=4)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "wide_steps": cls(
                    d_model=6, d_state=3, d_conv=3, expand=3, dt_rank=4, dt_init="constant", conv_bias=False
                ),
                "no_conv": cls(d_model=4, d_state=16, expand=1, d_conv=0, init_std=0.3),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            window = max(self.d_conv - 1, 0) * dtype.itemsize
            return batch * self.d_inner * (window + self.d_state * accumulator_dtype(dtype).itemsize)

    def __init__(self, config: Mamba.Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = width = config.d_inner
        self.in_proj = nn.Linear(config.d_model, 2 * width, bias=False)
        conv = nn.Conv1d(width, width, config.d_conv, groups=width, bias=config.conv_bias) if config.d_conv else None
        self.conv1d = conv
        self.x_proj = nn.Linear(width, config.rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.rank, width)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, config.d_state + 1)).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, config.d_model, bias=False)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        # A step below 1e-4 would start with a dead gradient; the floor is the reference implementation's.
        dt = torch.exp(low + (high - low) * torch.rand(width)).clamp_min(1e-4)
        bound = config.dt_scale / math.sqrt(config.rank)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            if config.dt_init == "random":
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.dt_proj.weight.fill_(bound)
        if config.init_std is not None:
            for linear in (self.in_proj, self.x_proj, self.out_proj):
                nn.init.normal_(linear.weight, std=config.init_std)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Zero: nothing in the window, nothing remembered."""
        config, like = self.config, self.out_proj.weight
        device, dtype = device or like.device, dtype or like.dtype
        conv = torch.zeros(batch, max(config.d_conv - 1, 0), config.d_inner, device=device, dtype=dtype)
        ssm = torch.zeros(batch, config.d_inner, config.d_state, device=device, dtype=accumulator_dtype(dtype))
        return MambaState(conv, ssm)

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        window = self.state_like(x).conv if state is None else state.conv
        u_BLE, z_BLE, dt_BLE, B_BLN, C_BLN, window = self._inputs(x, window, reset)
        h_init = None if state is None else state.ssm
        A_EN = -torch.exp(self.A_log.to(accumulator_dtype(u_BLE.dtype)))
        y_BLE, ssm = selective_scan(
            u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, self.D, h_init=h_init, reset=reset, softplus=True
        )
        dual = partial(self._dual, C_BLN, B_BLN, dt_BLE, u_BLE)
        return LayerOut(self._emit(y_BLE, u_BLE, z_BLE, dual, branch), MambaState(window, ssm), {})

    def step(
        self, x: Tensor, state: MambaState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, MambaState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        *activations, window = self._inputs(x.unsqueeze(1), state.conv, None)
        u_BE, z_BE, dt_BE, B_BN, C_BN = (t.squeeze(1) for t in activations)
        A_EN = -torch.exp(self.A_log.to(state.ssm.dtype))
        y_BE, ssm = selective_step(u_BE, dt_BE, A_EN, B_BN, C_BN, self.D, state.ssm, softplus=True)
        dual = partial(self._dual, C_BN, B_BN, dt_BE, u_BE)
        return self._emit(y_BE, u_BE, z_BE, dual, branch), MambaState(window, ssm)

    def _inputs(self, x: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
        """u, z, dt before its softplus, B, C and the convolution's next window."""
        config = self.config
        u, z = split_linear(x, self.in_proj.weight, (config.d_inner, config.d_inner))
        if self.conv1d is None:
            u = F.silu(u)
        else:
            u, window = causal_conv(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, window, reset=reset, silu=True)
        dt, B, C = self.x_proj(u).split([config.rank, config.d_state, config.d_state], -1)
        if dt.dtype == self.dt_proj.bias.dtype:
            dt = self.dt_proj(dt)
        else:
            # The bias sets step sizes over two decades: in half precision it is added after the product.
            dt = F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias
        return u, z, dt, B, C, window

    def _dual(self, C: Tensor, B: Tensor, dt: Tensor, u: Tensor) -> Dual:
        """``dt`` as ``_inputs`` gives it, before its softplus."""
        steps = F.softplus(dt) / F.softplus(self.dt_proj.bias.to(dt.dtype)).mean()
        return Dual(C, B, u * steps.to(u.dtype))

    def _emit(self, y: Tensor, u: Tensor, z: Tensor, dual: Callable[[], Dual], branch: Branch | None) -> Tensor:
        y = y.to(u.dtype)
        if branch is not None:
            y = y + branch(u, dual)
        return self.out_proj(gated(y, z))
