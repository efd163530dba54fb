"""Multi-head causal attention with rotary positions: over a window, or over everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.ops.lifetimes import timeline
from recollect.ops.patterns import Full, Pattern, Window
from recollect.ops.rotary import rotate
from recollect.ops.sparse_attention import Memory, init_memory, memory_bytes, sparse_attention


class Attention(SequenceLayer):
    """y_i = W_o concat_h sum_j softmax_j(q_i . k_j / sqrt P) v_j over the last ``window`` positions of the segment.

    ``window=None`` attends to the whole segment; its state then grows with every position, which suits short tasks.
    Rotary positions (arXiv 2104.09864) count from the segment's start. State: a ring of ``window`` keys and values
    per head.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="attention"):
        """``d_model`` is split evenly over ``n_heads``; with ``rotary`` the width of a head must be even."""

        n_heads: int = 4
        window: int | None = 64
        rotary: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.n_heads < 1 or self.d_model % self.n_heads:
                raise ConfigError(f"{self.kind}: d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
            if self.rotary and (self.d_model // self.n_heads) % 2:
                raise ConfigError(
                    f"{self.kind}: rotary positions need an even head width, got {self.d_model // self.n_heads}"
                )
            if self.window is not None and self.window < 1:
                raise ConfigError(f"{self.kind}: window must be at least 1 or null, got {self.window}")

        @property
        def patterns(self) -> tuple[Pattern, ...]:
            """The key set as a sparse pattern."""
            return (Full(),) if self.window is None else (Window(self.window),)

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, n_heads=2, window=7)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "full": cls(d_model=8, n_heads=2, window=None),
                "no-positions": cls(d_model=6, n_heads=2, window=64, rotary=False),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """Keys, values and positions: constant with a window, proportional to ``seen`` without."""
            width = self.d_model // self.n_heads
            return memory_bytes(self.patterns, batch, self.n_heads, width, width, dtype.itemsize, seen)

    State = Memory

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.d_head = config.d_model // config.n_heads
        self.to_qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Memory:
        weight = self.out.weight
        return init_memory(
            self.config.patterns,
            batch,
            self.config.n_heads,
            self.d_head,
            self.d_head,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def forward(self, x: Tensor, state: Memory | None = None, *, reset: Tensor | None = None) -> LayerOut:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.config.n_heads, self.d_head)).unbind(2)
        if self.config.rotary:
            start = state.next_position if state else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            position = timeline(x.shape[1], 0, start, reset).position_BL
            q, k = rotate(q, position), rotate(k, position)
        y, memory = sparse_attention(q, k, v, self.config.patterns, memory=state, reset=reset)
        return LayerOut(self.out(y.flatten(-2)), memory, {})

    def step(self, x: Tensor, state: Memory, *, reset: Tensor | None = None) -> tuple[Tensor, Memory]:
        """One query against the remembered keys: cost O(window d_model)."""
        out = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return out.y[:, 0], out.state
