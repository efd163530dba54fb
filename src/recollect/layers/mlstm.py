"""The mLSTM block of xLSTM (arXiv 2405.04517): a matrix memory with exponential gates between two projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.layer import Branch, BranchedConfig, BranchedLayer, LayerOut
from recollect.core.state import where_reset
from recollect.ops.conv import causal_conv
from recollect.ops.mlstm import MatrixMemory, mlstm, mlstm_init, mlstm_step
from recollect.ops.scan import accumulator_dtype

PRODUCT_WIDTH = 32
"""Small blocks are merged up to this width: products of 4 x 4 take twice as long on a CPU."""


class MLSTMState(NamedTuple):
    """The last ``d_conv - 1`` inputs of the convolution (B, W-1, E), and the memory C, n and m."""

    conv: Tensor
    memory: MatrixMemory


class MLSTM(BranchedLayer):
    """[a, z] = W x; u = SiLU(conv(a)); q, k from u and v from a, in small blocks; gates i, f linear in (q, k, v);
    output = W_o ((LayerNorm_head(mLSTM(q, k, v, i, f)) + skip * u) * SiLU(z)).

    The paper's block (its figure 10) without the residual and the norm around it. A branch reads u and is added before
    the gate. O(L E P) time with heads of P; E (P + 1) + H reals of state per row, kept in at least float32, and the
    convolution's window.
    """

    @dataclass(frozen=True)
    class Config(BranchedConfig, kind="mlstm"):
        """``d_inner = expand * d_model`` in ``n_heads`` heads; q, k and v come from blocks of ``qkv_block`` channels.

        ``d_conv = 0`` leaves the convolution out. Forget gates start at sigmoid(3) to sigmoid(6), head by head; input
        gates near 1. ``chunk_size`` matters where chunks are used, as on a GPU.
        """

        n_heads: int = 4
        expand: int = 2
        qkv_block: int = 4
        d_conv: int = 4
        chunk_size: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("n_heads", "expand", "qkv_block", "chunk_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
            if self.d_conv < 0:
                raise ConfigError(f"{self.kind}: d_conv must be 0 (no convolution) or more, got {self.d_conv}")
            for name in ("n_heads", "qkv_block"):
                if self.inner % getattr(self, name):
                    raise ConfigError(
                        f"{self.kind}: d_inner = expand * d_model = {self.inner} is not divisible by {name} "
                        f"{getattr(self, name)}"
                    )

        @property
        def inner(self) -> int:
            return self.expand * self.d_model

        @property
        def d_head(self) -> int:
            """Width of a head, for keys and values alike."""
            return self.inner // self.n_heads

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, chunk_size=16)

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            return {
                "tiny": cls.tiny(),
                "blocks": cls(d_model=6, n_heads=2, expand=3, qkv_block=3, d_conv=2, chunk_size=7),
                "no_conv": cls(d_model=4, n_heads=1, expand=1, qkv_block=1, d_conv=0),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:  # noqa: ARG002
            window = max(self.d_conv - 1, 0) * self.inner * dtype.itemsize
            memory = self.inner * (self.d_head + 1) + self.n_heads
            return batch * (window + memory * accumulator_dtype(dtype).itemsize)

    def __init__(self, config: MLSTM.Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = width = config.inner
        self.in_proj = nn.Linear(config.d_model, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, config.d_conv, groups=width) if config.d_conv else None
        block = config.qkv_block
        self.qkv = nn.Parameter(torch.randn(3, width // block, block, block) * (2 / (5 * block)) ** 0.5)
        self.gates = nn.Linear(3 * width, 2 * config.n_heads)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.skip = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, config.d_model, bias=False)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            input_bias, forget_bias = self.gates.bias.view(2, -1)
            input_bias.normal_(std=0.1)
            forget_bias.copy_(torch.linspace(3, 6, config.n_heads))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMState:
        """Zero: nothing in the window, nothing remembered."""
        config, like = self.config, self.out_proj.weight
        device, dtype = device or like.device, dtype or like.dtype
        conv = torch.zeros(batch, max(config.d_conv - 1, 0), config.inner, device=device, dtype=dtype)
        kept = accumulator_dtype(dtype)
        memory = mlstm_init(batch, config.n_heads, config.d_head, config.d_head, device=device, dtype=kept)
        return MLSTMState(conv, memory)

    def forward(
        self, x: Tensor, state: MLSTMState | None = None, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> LayerOut:
        before: MLSTMState = self.state_like(x) if state is None else state
        a, z = self.in_proj(x).chunk(2, -1)
        u, window = self._convolve(a, before.conv, reset)
        y, memory = mlstm(*self._read(a, u), memory=before.memory, reset=reset, chunk_size=self.config.chunk_size)
        return LayerOut(self._emit(y, u, z, branch), MLSTMState(window, memory), {})

    def step(
        self, x: Tensor, state: MLSTMState, *, reset: Tensor | None = None, branch: Branch | None = None
    ) -> tuple[Tensor, MLSTMState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        a, z = self.in_proj(x).chunk(2, -1)
        u, window = self._convolve(a.unsqueeze(1), state.conv, None)
        u = u.squeeze(1)
        y, memory = mlstm_step(*self._read(a, u), state.memory)
        return self._emit(y, u, z, branch), MLSTMState(window, memory)

    def _convolve(self, a: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.conv1d is not None:
            assert self.conv1d.bias is not None
            a, window = causal_conv(a, self.conv1d.weight.squeeze(1), self.conv1d.bias, window, reset=reset)
        return F.silu(a), window

    def _read(self, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k and v by heads, and the pre-activations of the input and the forget gates."""
        qkv = [_blocks(source, weight) for source, weight in zip((u, u, a), self.qkv.unbind(0), strict=True)]
        i, f = self.gates(torch.cat(qkv, -1)).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.config.n_heads, -1)) for part in qkv)
        return q, k, v, i, f

    def _emit(self, y_heads: Tensor, u: Tensor, z: Tensor, branch: Branch | None) -> Tensor:
        y = F.layer_norm(y_heads.to(u.dtype), y_heads.shape[-1:], eps=1e-5).flatten(-2) * self.norm_weight
        y = torch.addcmul(y, self.skip, u)
        if branch is not None:
            y = y + branch(u)
        return self.out_proj(y * F.silu(z))


def _blocks(x: Tensor, weight_GKK: Tensor) -> Tensor:
    """x times the block-diagonal matrix of ``weight``; neighbouring blocks are multiplied as one, zeros included."""
    n_blocks, size, _ = weight_GKK.shape
    merged = math.gcd(n_blocks, max(1, PRODUCT_WIDTH // size))
    if merged > 1:
        own = torch.eye(merged, dtype=weight_GKK.dtype, device=weight_GKK.device).view(merged, 1, merged, 1)
        wide = weight_GKK.view(-1, merged, size, 1, size) * own
        weight_GKK = wide.flatten(3, 4).flatten(1, 2)
    x_GK = x.unflatten(-1, weight_GKK.shape[:2])
    return torch.einsum("...gi,gij->...gj", x_GK, weight_GKK).flatten(-2)
