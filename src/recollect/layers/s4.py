"""S4 (arXiv 2111.00396): a state-space model per channel with HiPPO-LegS as diagonal plus low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.layers.channelwise import ChannelConfig, ChannelSSM, as_complex128, per_channel
from recollect.ops.dplr import Discrete, cast, discretise
from recollect.ops.hippo import legs_dplr
from recollect.ops.s4_kernel import s4, s4_step, s4_taps


class S4(ChannelSSM):
    """h' = (Lambda - P P^*) h + B u, y = 2 Re(C h) + D u per channel, bilinear; then GELU and a gated linear unit.

    It starts as HiPPO-LegS. Lambda's real part is -exp(log_A_real) and the low rank is subtracted, so the layer cannot
    become unstable. ``chunk`` is exactly causal: a compiled loop on a CPU, O(L D N), and chunks of matrix products
    elsewhere, O(L D (Q + N)) and O(D N^3 log Q) for the powers of A. ``fft`` makes the kernel from its generating
    function as the paper does and convolves by FFT, causal to rounding (with resets it runs in chunks); it is there to
    compare with, and much slower. A step is O(D N).
    """

    @dataclass(frozen=True)
    class Config(ChannelConfig, kind="s4"):
        """``chunk_size`` is a power of two."""

        method: Literal["chunk", "fft"] = "chunk"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.method not in ("chunk", "fft"):
                raise ConfigError(f"s4: method must be chunk or fft, got {self.method!r}")

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "wide": cls(d_model=5, d_state=12, dt_max=0.5),
                "fft": cls(d_model=4, d_state=6, chunk_size=8, method="fft"),
            }

    def __init__(self, config: S4.Config) -> None:
        super().__init__(config)
        self.method = config.method
        self.causality = "rounding" if config.method == "fft" else "exact"
        legs = legs_dplr(config.d_state)
        self.log_A_real = nn.Parameter(per_channel(torch.log(-legs.values.real), config.d_model))
        self.A_imag = nn.Parameter(per_channel(legs.values.imag, config.d_model))
        self.P = nn.Parameter(per_channel(torch.view_as_real(legs.p), config.d_model))
        self.B = nn.Parameter(per_channel(torch.view_as_real(legs.b), config.d_model))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Lambda, P, B and C (D, N/2) in complex128, and dt (D,) in float64."""
        values_DP = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        P, B, C = (as_complex128(t) for t in (self.P, self.B, self.C))
        return values_DP, P, B, C, torch.exp(self.log_dt.double())

    def system(self, dtype: torch.dtype) -> Discrete:
        return cast(discretise(*self.continuous()), dtype)

    def run(self, x: Tensor, h: Tensor, system: Discrete, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        taps_DL = s4_taps(*self.continuous(), x.shape[1]) if self.method == "fft" else None
        return s4(x, system, self.D, h, reset=reset, chunk_size=self.chunk_size, taps_DL=taps_DL)

    def run_step(self, x: Tensor, h: Tensor, system: Discrete) -> tuple[Tensor, Tensor]:
        return s4_step(x, system, self.D, h)
