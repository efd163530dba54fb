"""S5 (arXiv 2208.04933): one multi-input, multi-output diagonal state-space model per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.derived import Derived
from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.hippo import legs_normal
from recollect.ops.mimo_ssm import mimo_ssm, mimo_ssm_step
from recollect.ops.scan import accumulator_dtype

Discretisation = Literal["zoh", "bilinear"]


class S5State(NamedTuple):
    """The complex state, one of every conjugate pair: all real parts, then all imaginary parts, (B, N)."""

    h: Tensor


class S5(BranchedLayer):
    """h' = A h + B u, y = 2 Re(C h) + D u, then GELU and a gated linear unit; A diagonal.

    A starts as the normal part of HiPPO-LegS in ``n_blocks`` diagonal blocks. Its real part is -exp(log_A_real), so the
    layer cannot become unstable. States come in conjugate pairs, of which one is stored. O(L D N) time; N reals of
    state per row.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="s5"):
        """``d_state`` counts both of every conjugate pair. Step sizes start log-uniform in [dt_min, dt_max].

        ``discretisation``: ``zoh`` holds the input between samples, exp(dt A); ``bilinear`` is the trapezoidal rule.
        With ``learned_init`` the initial state, which is also what a reset returns to, is a parameter; else it is zero.
        """

        d_state: int = 64
        n_blocks: int = 1
        dt_min: float = 1e-3
        dt_max: float = 0.1
        discretisation: Discretisation = "zoh"
        learned_init: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.n_blocks < 1 or self.d_state < 2 or self.d_state % (2 * self.n_blocks):
                raise ConfigError(
                    f"s5: d_state {self.d_state} must be a positive multiple of 2 * n_blocks = {2 * self.n_blocks}"
                )
            if not 0 < self.dt_min <= self.dt_max:
                raise ConfigError(f"s5: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")
            if self.discretisation not in get_args(Discretisation):
                raise ConfigError(f"s5: discretisation must be 'zoh' or 'bilinear', got '{self.discretisation}'")

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_state=8)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "blocks": cls(d_model=6, d_state=12, n_blocks=3, dt_max=1.0),
                "learned_init": cls(d_model=4, d_state=8, n_blocks=2, learned_init=True),
                "bilinear": cls(d_model=6, d_state=4, discretisation="bilinear", learned_init=True),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return batch * self.d_state * accumulator_dtype(dtype).itemsize

    def __init__(self, config: S5.Config) -> None:
        super().__init__()
        self.d_inner = config.d_model
        self.discretisation: Discretisation = config.discretisation
        pairs, d_model = config.d_state // 2, config.d_model
        eigenvalues, vectors = legs_normal(config.d_state // config.n_blocks)
        vectors_NM = torch.block_diag(*[vectors] * config.n_blocks)
        B_ND = torch.randn(config.d_state, d_model, dtype=torch.complex128) / math.sqrt(d_model)
        C_DN = torch.randn(d_model, config.d_state, dtype=torch.complex128) / math.sqrt(config.d_state)
        default = torch.get_default_dtype()
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_A_real = nn.Parameter(torch.log(-eigenvalues.real).repeat(config.n_blocks).to(default))
        self.A_imag = nn.Parameter(eigenvalues.imag.repeat(config.n_blocks).to(default))
        self.B = nn.Parameter(torch.view_as_real(vectors_NM.mH @ B_ND.real.to(vectors_NM.dtype)).to(default))
        self.C = nn.Parameter(torch.view_as_real(C_DN.real.to(vectors_NM.dtype) @ vectors_NM).to(default))
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(pairs))
        self.h_init = nn.Parameter(torch.zeros(config.d_state)) if config.learned_init else None
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.stepped: Derived[tuple[Tensor, Tensor, Tensor]] = Derived()

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S5State:
        """Zero, or the learned initial state (which then receives gradients)."""
        like = self.log_dt if self.h_init is None else self.h_init
        dtype, device = accumulator_dtype(dtype or like.dtype), device or like.device
        if self.h_init is None:
            return S5State(torch.zeros(batch, 2 * self.log_dt.shape[0], device=device, dtype=dtype))
        return S5State(self.h_init.to(device=device, dtype=dtype).repeat(batch, 1))

    def forward(
        self, x: Tensor, state: S5State | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        start: Tensor = (self.state_like(x) if state is None else state).h
        y, h_BN = mimo_ssm(x, *self._discretise(start.dtype), self.D, start, reset=reset, h_reset=self.h_init)
        return LayerOut(self._emit(y, x, branch), S5State(h_BN), {})

    def step(
        self, x: Tensor, state: S5State, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, S5State]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        dtype = state.h.dtype
        system = self.stepped.of(dtype, lambda: self._discretise(dtype))
        y, h_BN = mimo_ssm_step(x, *system, self.D, state.h)
        return self._emit(y, x, branch), S5State(h_BN)

    def _discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Decay (2, N/2), input matrix (N, D) and output matrix (D, N), real and imaginary parts side by side.

        S5, section 3.2 and equation 6. With z = dt A, zero-order hold: decay e^z, input (e^z - 1) / A * B. Bilinear:
        decay (1 + z/2) / (1 - z/2), input dt / (1 - z/2) * B. Output: 2 Re(C h) = 2 (Re C Re h - Im C Im h).
        """
        dt_N = torch.exp(self.log_dt.to(dtype))
        A_re, A_im = -torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype)
        re, im = A_re * dt_N, A_im * dt_N
        if self.discretisation == "zoh":
            size, size_less_1, cos, sin = torch.exp(re), torch.expm1(re), torch.cos(im), torch.sin(im)
            decay = (size * cos, size * sin)
            # e^z - 1 without cancellation where z is small, as it is for the slowest states.
            grown = (size_less_1 * cos - 2 * torch.sin(im / 2) ** 2, decay[1])
            gain_re, gain_im = _quotient(grown, (A_re, A_im))
        else:
            below = (1 - re / 2, -im / 2)
            decay = _quotient((1 + re / 2, im / 2), below)
            gain_re, gain_im = _quotient((dt_N, torch.zeros_like(dt_N)), below)
        B_re, B_im = self.B.to(dtype).unbind(-1)
        gain_re, gain_im = gain_re.unsqueeze(-1), gain_im.unsqueeze(-1)
        inward = torch.cat([gain_re * B_re - gain_im * B_im, gain_re * B_im + gain_im * B_re])
        C_re, C_im = self.C.to(dtype).unbind(-1)
        return torch.stack(decay), inward, torch.cat([2 * C_re, -2 * C_im], -1)

    def _emit(self, y: Tensor, x: Tensor, branch: Branch | None) -> Tensor:
        if branch is not None:
            y = y + branch(x)
        return F.glu(self.out_proj(F.gelu(y)), -1)


def _quotient(over: tuple[Tensor, Tensor], below: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of ``over`` / ``below``."""
    (a, b), (c, d) = over, below
    square = c * c + d * d
    return (a * c + b * d) / square, (b * c - a * d) / square
