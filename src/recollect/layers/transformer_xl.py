"""Multi-head attention with the relative positions of Transformer-XL (arXiv 1901.02860)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.ops.causal_attention import KeyMemory, init_memory, memory_bytes
from recollect.ops.patterns import Pattern, Window
from recollect.ops.relative_attention import Biases, relative_attention, sinusoids


class TransformerXL(SequenceLayer):
    """A_ij = (q_i + u) . k_j + (q_i + w) . W_r R_{i-j}; y_i = W_o concat_h sum_j softmax_j(A_ij / sqrt P) v_j.

    R is sinusoidal, u and w are biases of each head. Position i sees its own and the ``window`` - 1 positions before it
    in its segment, exactly: a memory that slides, where the paper's reaches back to the start of the previous segment
    and so sees more or less depending on the cut. Keys that are remembered keep their gradients unless the caller
    detaches the state; the paper always does.

    Time O(L window D), memory O(L D). State: ``window`` - 1 keys and values per head.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="transformer_xl"):
        """``d_model`` is even and split evenly over ``n_heads``."""

        n_heads: int = 4
        window: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.n_heads < 1 or self.d_model % self.n_heads:
                raise ConfigError(f"{self.kind}: d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
            if self.d_model % 2:
                raise ConfigError(f"{self.kind}: sinusoidal positions need an even d_model, got {self.d_model}")
            if self.window < 1:
                raise ConfigError(f"{self.kind}: window must be at least 1, got {self.window}")

        @property
        def patterns(self) -> tuple[Pattern, ...]:
            """The key set as a sparse pattern: what a query's key budget is counted by."""
            return (Window(self.window),)

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, n_heads=2, window=7)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "long": cls(d_model=6, n_heads=1, window=64),
                "itself": cls(d_model=4, n_heads=2, window=1),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """Constant: keys and values of the positions that a next query can see, and one count."""
            width = self.d_model // self.n_heads
            return memory_bytes(self.window, batch, self.n_heads, width, width, dtype.itemsize, seen)

    State = KeyMemory

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.d_head = config.d_model // config.n_heads
        self.to_qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.to_r = nn.Linear(config.d_model, config.d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.n_heads, self.d_head))
        self.position_bias = nn.Parameter(torch.zeros(config.n_heads, self.d_head))
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KeyMemory:
        c, like = self.config, self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        return init_memory(c.window, batch, c.n_heads, self.d_head, self.d_head, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: KeyMemory | None = None, *, reset: Tensor | None = None) -> LayerOut:
        c = self.config
        q, k, v = self.to_qkv(x).unflatten(-1, (3, c.n_heads, self.d_head)).unbind(2)
        y, memory = relative_attention(
            q,
            k,
            v,
            sinusoids(c.window, c.d_model, device=x.device, dtype=x.dtype),
            self.to_r.weight.unflatten(0, (c.n_heads, self.d_head)),
            Biases(self.content_bias, self.position_bias),
            memory=state,
            reset=reset,
        )
        return LayerOut(self.out(y.flatten(-2)), memory, {})

    def step(self, x: Tensor, state: KeyMemory, *, reset: Tensor | None = None) -> tuple[Tensor, KeyMemory]:
        """One query against the remembered keys: O(window n_heads d_model)."""
        out = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return out.y[:, 0], out.state
