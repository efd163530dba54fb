"""S4D (arXiv 2206.11893): a diagonal state-space model per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.layers.channelwise import ChannelConfig, ChannelSSM, as_complex128, per_channel
from recollect.ops.hippo import DiagonalInit, diagonal
from recollect.ops.siso_ssm import siso_ssm, siso_ssm_step


class S4D(ChannelSSM):
    """h' = A h + u, y = 2 Re(C h) + D u per channel, A diagonal; then GELU and a gated linear unit.

    B is one: only its product with C matters. A's real part is -exp(log_A_real), so the layer cannot become unstable.
    The carried state is h without the discretised B, which is put into C. O(L D N) time.
    """

    @dataclass(frozen=True)
    class Config(ChannelConfig, kind="s4d"):
        """``init``: the diagonal of HiPPO-LegS (``legs``), S4D-Lin or S4D-Inv; ``discretisation``: zero-order hold or
        bilinear.
        """

        init: DiagonalInit = "legs"
        discretisation: Literal["zoh", "bilinear"] = "zoh"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.init not in ("legs", "lin", "inv"):
                raise ConfigError(f"s4d: init must be legs, lin or inv, got {self.init!r}")
            if self.discretisation not in ("zoh", "bilinear"):
                raise ConfigError(f"s4d: discretisation must be zoh or bilinear, got {self.discretisation!r}")

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "lin-bilinear": cls(d_model=34, d_state=2, dt_max=0.5, init="lin", discretisation="bilinear"),
                "inv": cls(d_model=5, d_state=6, chunk_size=1, init="inv"),
            }

    def __init__(self, config: S4D.Config) -> None:
        super().__init__(config)
        self.bilinear = config.discretisation == "bilinear"
        A_P = diagonal(config.init, config.d_state)
        self.log_A_real = nn.Parameter(per_channel(torch.log(-A_P.real), config.d_model))
        self.A_imag = nn.Parameter(per_channel(A_P.imag, config.d_model))

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """a and c (D, P): h_t = a h_{t-1} + u_t, y_t = Re(c h_t)."""
        A_DP = torch.complex(-torch.exp(self.log_A_real.double()), self.A_imag.double())
        dt_D1 = torch.exp(self.log_dt.double()).unsqueeze(-1)
        if self.bilinear:
            b_DP = dt_D1 / (1 - dt_D1 / 2 * A_DP)
            a_DP = (1 + dt_D1 / 2 * A_DP) / (1 - dt_D1 / 2 * A_DP)
        else:
            a_DP = torch.exp(dt_D1 * A_DP)
            b_DP = (a_DP - 1) / A_DP
        return a_DP.to(dtype), (2 * as_complex128(self.C) * b_DP).to(dtype)

    def run(self, x: Tensor, h: Tensor, system: tuple[Tensor, Tensor], reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return siso_ssm(x, *system, self.D, h, reset=reset, chunk_size=self.chunk_size)

    def run_step(self, x: Tensor, h: Tensor, system: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return siso_ssm_step(x, *system, self.D, h)
