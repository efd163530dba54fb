"""Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates) in PyTorch's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.recurrent import CellWeights, lstm, lstm_step


class LSTMState(NamedTuple):
    """What the layer puts out and what it keeps to itself: hidden vector and cell, (B, E) each."""

    h: Tensor
    c: Tensor


class LSTM(BranchedLayer):
    """i, f, o = sigmoid(W u + U h), g = tanh(W_g u + U_g h), c = f * c + i * g, h = o * tanh(c); the output is W_o h.

    u is the input, projected when ``d_inner`` is another width. Sequential: O(L E^2) time; 2E reals of state per row.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="lstm"):
        """``d_inner`` is the width of the hidden vector; None means ``d_model``."""

        d_inner: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.d_inner is not None and self.d_inner < 1:
                raise ConfigError(f"lstm: d_inner must be at least 1, got {self.d_inner}")

        @property
        def inner(self) -> int:
            return self.d_inner or self.d_model

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {"tiny": cls.tiny(), "wide": cls(d_model=6, d_inner=10)}

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return 2 * batch * self.inner * dtype.itemsize

    def __init__(self, config: LSTM.Config) -> None:
        super().__init__()
        self.d_inner = config.inner
        projected = self.d_inner != config.d_model
        self.in_proj = nn.Linear(config.d_model, self.d_inner) if projected else nn.Identity()
        self.lstm = nn.LSTM(self.d_inner, self.d_inner, batch_first=True)
        self.out_proj = nn.Linear(self.d_inner, config.d_model)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LSTMState:
        """Two zero vectors per row."""
        like = self.out_proj.weight
        zeros = torch.zeros(2, batch, self.d_inner, device=device or like.device, dtype=dtype or like.dtype)
        return LSTMState(*zeros.unbind())

    def forward(
        self, x: Tensor, state: LSTMState | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        start: LSTMState = self.state_like(x) if state is None else state
        u_BLE: Tensor = self.in_proj(x)
        h_BLE, *last = lstm(u_BLE, self._weights(), *start, reset=reset)
        y_BLE = h_BLE if branch is None else h_BLE + branch(u_BLE)
        return LayerOut(self.out_proj(y_BLE), LSTMState(*last), {})

    def step(
        self, x: Tensor, state: LSTMState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, LSTMState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        u_BE: Tensor = self.in_proj(x)
        h_BE, c_BE = lstm_step(u_BE, self._weights(), state.h, state.c)
        y_BE = h_BE if branch is None else h_BE + branch(u_BE)
        return self.out_proj(y_BE), LSTMState(h_BE, c_BE)

    def _weights(self) -> CellWeights:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return CellWeights(*(self.lstm.get_parameter(name) for name in names))
