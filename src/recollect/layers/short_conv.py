"""A short gated causal convolution: the mixer that small recall Transformers put in front of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.core.state import where_reset
from recollect.ops.conv import causal_conv
from recollect.ops.gate import gated
from recollect.ops.projection import split_linear


class ShortConvState(NamedTuple):
    """The last ``d_conv - 1`` inputs of the convolution, (B, W-1, D)."""

    conv: Tensor


class ShortConv(SequenceLayer):
    """[u, g] = W_in x; y = W_out (conv(u) * SiLU(g)), the convolution depthwise over the last W positions.

    The gated short convolution of H3 (arXiv 2212.14052) and Hyena (arXiv 2302.10866) without their long one. It shifts
    a token's content to the next positions, so that attention after it can match a key with the value that follows it:
    alternate the two, ``Backbone.Config(d, layers=(conv, attention, conv, attention))``, as the attention rows of
    Zoology (arXiv 2312.04927) do. O(L D (D + W)) time; W - 1 positions of state.
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="short_conv"):
        """``d_conv`` is the width W of the convolution; 1 sees its own position alone and has no state."""

        d_conv: int = 4
        conv_bias: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.d_conv < 1:
                raise ConfigError(f"{self.kind}: d_conv must be at least 1, got {self.d_conv}")

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "wide": cls(d_model=6, d_conv=7, conv_bias=False),
                "pointwise": cls(d_model=4, d_conv=1),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            return batch * (self.d_conv - 1) * self.d_model * dtype.itemsize

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width, bias=config.conv_bias)
        self.out_proj = nn.Linear(width, width, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ShortConvState:
        """Zero: nothing in the window."""
        config, like = self.config, self.out_proj.weight
        size = (batch, config.d_conv - 1, config.d_model)
        return ShortConvState(torch.zeros(size, device=device or like.device, dtype=dtype or like.dtype))

    def forward(self, x: Tensor, state: ShortConvState | None = None, *, reset: Tensor | None = None) -> LayerOut:
        before: ShortConvState = self.state_like(x) if state is None else state
        u, gate = split_linear(x, self.in_proj.weight, (x.shape[-1], x.shape[-1]))
        y, window = causal_conv(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, before.conv, reset=reset)
        return LayerOut(self.out_proj(gated(y, gate)), ShortConvState(window), {})

    def step(self, x: Tensor, state: ShortConvState, *, reset: Tensor | None = None) -> tuple[Tensor, ShortConvState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        out = self(x.unsqueeze(1), state)
        return out.y.squeeze(1), out.state
