"""DSS (arXiv 2203.14343): a diagonal state-space model per channel whose kernel is a sum of exponentials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.layers.channelwise import ChannelConfig, ChannelSSM, as_complex128, per_channel
from recollect.ops.hippo import diagonal
from recollect.ops.siso_ssm import siso_ssm, siso_ssm_step

EPSILON = 1e-7


class DSS(ChannelSSM):
    """K_j = 2 Re sum_i w_i / lambda_i exp(lambda_i dt j) n_i per channel, y = K * u + D u; then GELU and a gate.

    ``exp`` (proposition 1a): n_i = exp(lambda_i dt) - 1, the zero-order hold. ``softmax`` (proposition 1b): n_i is one
    over the sum of exp(lambda_i dt r) for r below M, so that every row of the kernel is a softmax over M positions.

    The paper takes M = L, the length at hand. Its outputs would then depend on how much is still to come, and could
    be neither continued from a state nor stepped. Here M is ``max_length``, fixed: n_i is a constant of the state, the
    recurrence is h_t = exp(lambda dt) h_{t-1} + u_t, and a sequence of exactly M positions gives the paper's output.
    Longer ones go on with the same kernel. The paper lets the softmax variant have Re lambda > 0, normalised backward
    from the last position; that is left out, as such a state grows without bound in a stream: Re lambda = -exp(.).
    O(L D N) time.
    """

    @dataclass(frozen=True)
    class Config(ChannelConfig, kind="dss"):
        """``max_length``, M, is read by the variant ``softmax`` only."""

        variant: Literal["exp", "softmax"] = "exp"
        max_length: int = 1024

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.variant not in ("exp", "softmax"):
                raise ConfigError(f"dss: variant must be exp or softmax, got {self.variant!r}")
            if self.max_length < 1:
                raise ConfigError(f"dss: max_length must be at least 1, got {self.max_length}")

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "softmax": cls(d_model=5, d_state=6, chunk_size=8, variant="softmax", max_length=40),
            }

    def __init__(self, config: DSS.Config) -> None:
        super().__init__(config)
        self.max_length = config.max_length if config.variant == "softmax" else None
        A_P = diagonal("legs", config.d_state)
        self.log_A_real = nn.Parameter(per_channel(torch.log(-A_P.real), config.d_model))
        self.A_imag = nn.Parameter(per_channel(A_P.imag, config.d_model))

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and c (D, P): h_t = a h_{t-1} + u_t, y_t = Re(c h_t)."""
        A_DP = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        step_DP = A_DP * torch.exp(self.log_dt.double()).unsqueeze(-1)
        a_DP = torch.exp(step_DP)
        weight_DP = a_DP - 1
        if self.max_length is not None:
            # A sum of M turning numbers can come close to zero: the paper bounds its inverse by EPSILON.
            total_DP = (torch.exp(step_DP * self.max_length) - 1) / weight_DP
            weight_DP = total_DP.conj() / (total_DP * total_DP.conj() + EPSILON)
        return a_DP.to(dtype), (2 * as_complex128(self.C) / A_DP * weight_DP).to(dtype)

    def run(self, x: Tensor, h: Tensor, system: tuple[Tensor, Tensor], reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return siso_ssm(x, *system, self.D, h, reset=reset, chunk_size=self.chunk_size)

    def run_step(self, x: Tensor, h: Tensor, system: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return siso_ssm_step(x, *system, self.D, h)
