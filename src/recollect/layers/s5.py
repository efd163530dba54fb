"""S5 (arXiv 2208.04933): one multi-input, multi-output diagonal state-space model per layer."""

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
from recollect.ops.scan import accumulator_dtype, scan


class S5State(NamedTuple):
    """The complex state, one of every conjugate pair, as real and imaginary parts: (B, N/2, 2)."""

    h: Tensor


class S5(BranchedLayer):
    """h' = A h + B u, y = 2 Re(C h) + D u, then GELU and a gated linear unit; A diagonal, zero-order hold.

    A starts as the normal part of HiPPO-LegS in ``n_blocks`` diagonal blocks. Its real part is -exp(log_A_real), so the
    layer cannot become unstable. States come in conjugate pairs, of which one is stored. O(L D N) time; N reals of
    state per row.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="s5"):
        """``d_state`` counts both of every conjugate pair. Step sizes start log-uniform in [dt_min, dt_max].

        With ``learned_init`` the initial state, which is also what a reset returns to, is a parameter; else it is zero.
        """

        d_state: int = 64
        n_blocks: int = 1
        dt_min: float = 1e-3
        dt_max: float = 0.1
        learned_init: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.n_blocks < 1 or self.d_state < 2 or self.d_state % (2 * self.n_blocks):
                raise ConfigError(
                    f"s5: d_state {self.d_state} must be a positive multiple of 2 * n_blocks = {2 * self.n_blocks}"
                )
            if not 0 < self.dt_min <= self.dt_max:
                raise ConfigError(f"s5: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_state=8)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "blocks": cls(d_model=6, d_state=12, n_blocks=3, dt_max=1.0),
                "learned_init": cls(d_model=4, d_state=8, n_blocks=2, learned_init=True),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return batch * self.d_state * accumulator_dtype(dtype).itemsize

    def __init__(self, config: S5.Config) -> None:
        super().__init__()
        self.d_inner = config.d_model
        pairs, d_model = config.d_state // 2, config.d_model
        eigenvalues, vectors = hippo_normal(config.d_state // config.n_blocks)
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
        self.h_init = nn.Parameter(torch.zeros(pairs, 2)) if config.learned_init else None
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S5State:
        """Zero, or the learned initial state (which then receives gradients)."""
        like = self.log_dt if self.h_init is None else self.h_init
        dtype, device = accumulator_dtype(dtype or like.dtype), device or like.device
        if self.h_init is None:
            return S5State(torch.zeros(batch, like.shape[0], 2, device=device, dtype=dtype))
        return S5State(self.h_init.to(device=device, dtype=dtype).repeat(batch, 1, 1))

    def forward(
        self, x: Tensor, state: S5State | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        start: Tensor = (self.state_like(x) if state is None else state).h
        decay_N, inward, outward = self._discretise(start.dtype)
        drive_BLN = torch.view_as_complex(F.linear(x, inward.to(x.dtype)).to(start.dtype).unflatten(-1, (-1, 2)))
        fresh = None if self.h_init is None else torch.view_as_complex(self.h_init.to(start.dtype))
        h_BLN, h_BN = scan(decay_N, drive_BLN, torch.view_as_complex(start), reset=reset, h_reset=fresh)
        y = self._emit(torch.view_as_real(h_BLN), x, outward, branch)
        return LayerOut(y, S5State(torch.view_as_real(h_BN)), {})

    def step(
        self, x: Tensor, state: S5State, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, S5State]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        decay_N, inward, outward = self._discretise(state.h.dtype)
        drive_BN = torch.view_as_complex(F.linear(x, inward.to(x.dtype)).to(state.h.dtype).unflatten(-1, (-1, 2)))
        h = torch.view_as_real(decay_N * torch.view_as_complex(state.h) + drive_BN)
        return self._emit(h, x, outward, branch), S5State(h)

    def _discretise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """exp(dt A) (N/2,), and (exp(dt A) - 1) / A * B and 2 C as real matrices (N, D) and (D, N)."""
        A_N = torch.complex(-torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype))
        decay_N = torch.exp(A_N * torch.exp(self.log_dt.to(dtype)))
        B_ND = torch.view_as_complex(self.B.to(dtype))
        inward_NrD = torch.view_as_real(((decay_N - 1) / A_N).unsqueeze(-1) * B_ND).transpose(1, 2)
        outward_DNr = 2 * self.C.to(dtype) * self.C.new_tensor([1, -1]).to(dtype)
        return decay_N, inward_NrD.flatten(0, 1), outward_DNr.flatten(1)

    def _emit(self, h: Tensor, x: Tensor, outward: Tensor, branch: Branch | None) -> Tensor:
        y = F.linear(h.flatten(-2), outward).to(x.dtype) + self.D * x
        if branch is not None:
            y = y + branch(x)
        return F.glu(self.out_proj(F.gelu(y)), -1)


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (size/2,) above the real axis and their eigenvectors (size, size/2): normal part of HiPPO-LegS.

    S5, section B.1.1: entries -1/2 on the diagonal and -+ sqrt((n + 1/2)(k + 1/2)) below and above it. complex128.
    """
    root = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    lower = torch.tril(root.unsqueeze(1) * root, diagonal=-1)
    # The skew part S = lower.T - lower; -i S is Hermitian with eigenvalues in pairs +-w, sorted upwards.
    frequency, vectors = torch.linalg.eigh(-1j * (lower.T - lower))
    half = size // 2
    return torch.complex(torch.full_like(frequency[half:], -0.5), frequency[half:]), vectors[:, half:]
