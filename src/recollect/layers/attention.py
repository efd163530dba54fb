"""Multi-head causal attention with rotary positions: over a window, or over everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.ops.attention_map import AttentionInputs
from recollect.ops.causal_attention import KeyMemory, causal_attention, init_memory, memory_bytes, positions
from recollect.ops.patterns import Full, Pattern, Window
from recollect.ops.rotary import rotate


class Attention(SequenceLayer):
    """y_i = W_o concat_h sum_j softmax_j(q_i . k_j / sqrt P) v_j over the last ``window`` positions of the segment.

    ``window=None`` attends to the whole segment; its state then grows with every position, which suits short tasks.
    Rotary positions (arXiv 2104.09864) count from the segment's start. With ``n_kv_heads`` fewer heads of keys and
    values are shared by groups of query heads (arXiv 2305.13245), and the state shrinks with them.

    Time O(L window D) and memory O(L D) with a window; without one O(L^2 D) and O(L D). State: ``window`` - 1 keys and
    values per key head.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="attention"):
        """``d_model`` is split evenly over ``n_heads``; with ``rotary`` the width of a head must be even.

        ``n_kv_heads`` divides ``n_heads``; None means as many.
        """

        n_heads: int = 4
        window: int | None = 64
        rotary: bool = True
        n_kv_heads: int | None = None

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
            if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
                raise ConfigError(
                    f"{self.kind}: n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}"
                )

        @property
        def patterns(self) -> tuple[Pattern, ...]:
            """The key set as a sparse pattern: what a query's key budget is counted by."""
            return (Full(),) if self.window is None else (Window(self.window),)

        @property
        def kv_heads(self) -> int:
            """Heads of keys and values, G."""
            return self.n_kv_heads or self.n_heads

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, n_heads=2, window=7)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "full": cls(d_model=8, n_heads=2, window=None),
                "no-positions": cls(d_model=6, n_heads=2, window=64, rotary=False),
                "itself": cls(d_model=4, n_heads=2, window=1),
                "groups": cls(d_model=12, n_heads=6, window=33, n_kv_heads=2),
                "full-one-key-head": cls(d_model=8, n_heads=4, window=None, n_kv_heads=1),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """Keys and values that a next query can see: constant with a window, proportional to ``seen`` without."""
            width = self.d_model // self.n_heads
            return memory_bytes(self.window, batch, self.kv_heads, width, width, dtype.itemsize, seen)

    State = KeyMemory

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.d_head = config.d_model // config.n_heads
        width = (config.n_heads + 2 * config.kv_heads) * self.d_head
        self.to_qkv = nn.Linear(config.d_model, width, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyMemory:
        c, like = self.config, self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        return init_memory(c.window, batch, c.kv_heads, self.d_head, self.d_head, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: KeyMemory | None = None, *, reset: Tensor | None = None) -> LayerOut:
        c = self.config
        qk, v = self.to_qkv(x).unflatten(-1, (-1, self.d_head)).split([c.n_heads + c.kv_heads, c.kv_heads], 2)
        if c.rotary:
            start = state.next_position if state else torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            qk = rotate(qk, positions(x.shape[1], start, reset))
        q, k = qk.split([c.n_heads, c.kv_heads], 2)
        y, memory = causal_attention(q, k, v, window=c.window, memory=state, reset=reset)
        return LayerOut(self.out(y.flatten(-2)), memory, {})

    def step(self, x: Tensor, state: KeyMemory, *, reset: Tensor | None = None) -> tuple[Tensor, KeyMemory]:
        """One query against the remembered keys: cost O(window d_model)."""
        out = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return out.y[:, 0], out.state

    def attention_inputs(self, x: Tensor) -> AttentionInputs:
        """What ``forward`` attends with over fresh sequences x (B, L, D), as ``ops.attention_map`` takes it."""
        c = self.config
        qk = self.to_qkv(x).unflatten(-1, (-1, self.d_head))[:, :, : c.n_heads + c.kv_heads]
        if c.rotary:
            qk = rotate(qk, positions(x.shape[1], torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), None))
        q, k = qk.split([c.n_heads, c.kv_heads], 2)
        return AttentionInputs(q, k.repeat_interleave(c.n_heads // c.kv_heads, 2), c.patterns, self.d_head**-0.5)
