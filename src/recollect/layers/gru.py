"""Gated recurrent unit (arXiv 1406.1078) in PyTorch's form: the recurrent baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.recurrent import CellWeights, gru, gru_step


class GRUState(NamedTuple):
    """The hidden vector, (B, E)."""

    h: Tensor


class GRU(BranchedLayer):
    """r, z = sigmoid(W u + U h), n = tanh(W_n u + r * (U_n h)), h = (1 - z) * n + z * h; the output is W_o h.

    u is the input, projected when ``d_inner`` is another width. Sequential: O(L E^2) time; E reals of state per row.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="gru"):
        """``d_inner`` is the width of the hidden vector; None means ``d_model``."""

        d_inner: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.d_inner is not None and self.d_inner < 1:
                raise ConfigError(f"gru: d_inner must be at least 1, got {self.d_inner}")

        @property
        def inner(self) -> int:
            return self.d_inner or self.d_model

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {"tiny": cls.tiny(), "wide": cls(d_model=6, d_inner=10)}

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return batch * self.inner * dtype.itemsize

    def __init__(self, config: GRU.Config) -> None:
        super().__init__()
        self.d_inner = config.inner
        projected = self.d_inner != config.d_model
        self.in_proj = nn.Linear(config.d_model, self.d_inner) if projected else nn.Identity()
        self.gru = nn.GRU(self.d_inner, self.d_inner, batch_first=True)
        self.out_proj = nn.Linear(self.d_inner, config.d_model)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GRUState:
        """A zero vector per row."""
        like = self.out_proj.weight
        return GRUState(torch.zeros(batch, self.d_inner, device=device or like.device, dtype=dtype or like.dtype))

    def forward(
        self, x: Tensor, state: GRUState | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        h_BE: Tensor = (self.state_like(x) if state is None else state).h
        u_BLE: Tensor = self.in_proj(x)
        h_BLE, h_BE = gru(u_BLE, self._weights(), h_BE, reset=reset)
        y_BLE = h_BLE if branch is None else h_BLE + branch(u_BLE)
        return LayerOut(self.out_proj(y_BLE), GRUState(h_BE), {})

    def step(
        self, x: Tensor, state: GRUState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, GRUState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        u_BE: Tensor = self.in_proj(x)
        h_BE = gru_step(u_BE, self._weights(), state.h)
        y_BE = h_BE if branch is None else h_BE + branch(u_BE)
        return self.out_proj(y_BE), GRUState(h_BE)

    def _weights(self) -> CellWeights:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return CellWeights(*(self.gru.get_parameter(name) for name in names))
