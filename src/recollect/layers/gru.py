"""Gated recurrent unit (arXiv 1406.1078) in PyTorch's form: the recurrent baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset


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
        """The fused kernel where no row is reset after its first position, a loop over positions otherwise."""
        h_BE: Tensor = (self.state_like(x) if state is None else state).h
        u_BLE: Tensor = self.in_proj(x)
        if reset is not None and bool(reset[:, 1:].any()):
            gates_BLF, steps = self._input_gates(u_BLE), []
            for gates_BF, reset_B in zip(gates_BLF.unbind(1), reset.unbind(1), strict=True):
                h_BE = self._cell(gates_BF, h_BE.masked_fill(reset_B.unsqueeze(-1), 0))
                steps.append(h_BE)
            h_BLE = torch.stack(steps, 1)
        else:
            h_BE = h_BE if reset is None else h_BE.masked_fill(reset[:, :1], 0)
            h_BLE, last_1BE = self.gru(u_BLE, h_BE.unsqueeze(0).contiguous())
            h_BE = last_1BE[0]
        y_BLE = h_BLE if branch is None else h_BLE + branch(u_BLE)
        return LayerOut(self.out_proj(y_BLE), GRUState(h_BE), {})

    def step(
        self, x: Tensor, state: GRUState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, GRUState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        u_BE: Tensor = self.in_proj(x)
        h_BE = self._cell(self._input_gates(u_BE), state.h)
        y_BE = h_BE if branch is None else h_BE + branch(u_BE)
        return self.out_proj(y_BE), GRUState(h_BE)

    def _input_gates(self, u: Tensor) -> Tensor:
        return F.linear(u, self.gru.get_parameter("weight_ih_l0"), self.gru.get_parameter("bias_ih_l0"))

    def _cell(self, gates: Tensor, h: Tensor) -> Tensor:
        input_r, input_z, input_n = gates.chunk(3, -1)
        recurrent = F.linear(h, self.gru.get_parameter("weight_hh_l0"), self.gru.get_parameter("bias_hh_l0"))
        recurrent_r, recurrent_z, recurrent_n = recurrent.chunk(3, -1)
        n = torch.tanh(input_n + torch.sigmoid(input_r + recurrent_r) * recurrent_n)
        return n + torch.sigmoid(input_z + recurrent_z) * (h - n)
