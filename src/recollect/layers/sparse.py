"""Causal sparse attention over a union of patterns, as a sequence layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.core.types import Aux
from recollect.ops.hashing import draw_planes, sign_buckets
from recollect.ops.patterns import (
    Dilated,
    Full,
    KeySelection,
    Lsh,
    Pattern,
    Sink,
    Window,
    check_patterns,
    find,
)
from recollect.ops.selection import selection_loss
from recollect.ops.sparse_attention import Buckets, Memory, init_memory, memory_bytes, sparse_attention


class SparseAttention(SequenceLayer):
    """Attention in which position i sees the keys its patterns admit (``ops.patterns``), and nothing else.

    y_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt N) v_j, with q, k one linear map of x and no positional encoding,
    as in HAX (arXiv 2507.00449, section 4). ``project=False`` takes the inputs themselves as values and returns the
    heads as they are: the form in which HAX joins it to a state-space model.

    ``KeySelection`` scores a key by a small network of the key and the normalised sum of the queries up to it, both
    detached. In training its ranking loss is returned as ``aux["selection"]``. Hash planes are a buffer drawn once with
    the parameters; no statistic over the sequence enters the hash. Time O(L (K + log L)), memory O(L K).
    """

    @dataclass(frozen=True)
    class Config(LayerConfig, kind="sparse"):
        """``d_key`` is the width N of queries and keys of each head; values have width ``d_model / n_heads``."""

        d_key: int = 32
        n_heads: int = 1
        patterns: tuple[Pattern, ...] = (Lsh(32, n_bits=8), KeySelection(32))
        project: bool = True
        selection_target: Literal["mean", "sum"] = "mean"
        init_std: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            check_patterns(self.patterns)
            if self.d_key < 1:
                raise ConfigError(f"{self.kind}: d_key must be at least 1, got {self.d_key}")
            if self.n_heads < 1 or self.d_model % self.n_heads:
                raise ConfigError(f"{self.kind}: d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_key=4, patterns=(Lsh(4, n_bits=2), KeySelection(3)))

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            every = (Window(3), Sink(2), Dilated(2, stride=5), KeySelection(3), Lsh(4, n_bits=2, n_rounds=2))
            return {
                "tiny": cls.tiny(),
                "full": cls(d_model=8, d_key=4, patterns=(Full(),)),
                "window": cls(d_model=8, d_key=4, patterns=(Window(5),)),
                "lsh": cls(d_model=8, d_key=4, patterns=(Lsh(3, n_bits=2),)),
                "every-heads": cls(d_model=8, d_key=4, n_heads=2, patterns=every),
                "unprojected": cls(d_model=8, d_key=4, patterns=(Dilated(3, stride=4),), project=False),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """Bytes of memory slots and, with key selection, of the running query sum."""
            d_value, item = self.d_model // self.n_heads, dtype.itemsize
            slots = memory_bytes(self.patterns, batch, self.n_heads, self.d_key, d_value, item, seen)
            summed = self.d_key if find(self.patterns, KeySelection) else 0
            return slots + batch * self.n_heads * summed * item

    class State(NamedTuple):
        """The remembered keys, and the sum of the segment's queries (B, H, N) when key selection needs it."""

        memory: Memory
        query_sum: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        heads, d_key, d_value = config.n_heads, config.d_key, config.d_model // config.n_heads
        self.d_value = d_value
        self.to_qk = nn.Linear(config.d_model, 2 * heads * d_key, bias=False)
        if config.init_std is not None:
            nn.init.normal_(self.to_qk.weight, std=config.init_std)
        self.to_v = nn.Linear(config.d_model, config.d_model, bias=False) if config.project else nn.Identity()
        self.out = nn.Linear(config.d_model, config.d_model, bias=False) if config.project else nn.Identity()
        self.lsh = find(config.patterns, Lsh)
        self.key_selection = find(config.patterns, KeySelection)
        self.planes: Tensor
        if self.lsh is not None:
            self.register_buffer("planes", draw_planes(d_key, heads, self.lsh.n_rounds, self.lsh.n_bits))
        if self.key_selection is not None:
            width = 2 * d_key
            self.scorer = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
            )

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        c = self.config
        device = self.to_qk.weight.device if device is None else device
        dtype = self.to_qk.weight.dtype if dtype is None else dtype
        memory = init_memory(c.patterns, batch, c.n_heads, c.d_key, self.d_value, device=device, dtype=dtype)
        width = c.d_key if self.key_selection else 0
        return self.State(memory, torch.zeros(batch, c.n_heads, width, device=device, dtype=dtype))

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        c = self.config
        q, k = self.to_qk(x).unflatten(-1, (2, c.n_heads, c.d_key)).unbind(2)
        v = self.to_v(x).unflatten(-1, (c.n_heads, self.d_value))
        score, query_sum, aux = None, x.new_zeros(x.shape[0], c.n_heads, 0), Aux()
        if self.key_selection is not None:
            seen, query_sum = running_sum(q.detach(), None if state is None else state.query_sum, reset)
            score = self.scorer(torch.cat([k.detach(), F.normalize(seen, dim=-1)], -1)).squeeze(-1)
            if self.training:
                n = max(32, 2 * self.key_selection.n_keys)
                aux["selection"] = selection_loss(
                    q.detach(), k.detach(), score, n=n, reset=reset, target=c.selection_target
                )
        buckets = Buckets(sign_buckets(q, self.planes), sign_buckets(k, self.planes)) if self.lsh else None
        y, memory = sparse_attention(
            q,
            k,
            v,
            c.patterns,
            memory=None if state is None else state.memory,
            reset=reset,
            score_BLH=score,
            buckets=buckets,
        )
        return LayerOut(self.out(y.flatten(-2)), self.State(memory, query_sum), aux)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """One query against the memory's slots: cost O(M (N + P)) for M slots, whatever came before."""
        out = self(x[:, None], state, reset=None if reset is None else reset[:, None])
        return out.y[:, 0], out.state


def running_sum(x_BLHN: Tensor, start_BHN: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over each segment up to and including every position, and the last one to carry on from."""
    start = torch.zeros_like(x_BLHN[:, 0]) if start_BHN is None else start_BHN
    total = torch.cat([start[:, None], x_BLHN], 1).cumsum(1)
    if reset is not None:
        at = torch.arange(x_BLHN.shape[1], device=x_BLHN.device)
        since = torch.where(reset, at, -1).cummax(1).values
        before = total.gather(1, since.clamp(min=0)[:, :, None, None].expand_as(x_BLHN))
        summed = total[:, 1:] - torch.where((since >= 0)[:, :, None, None], before, 0)
    else:
        summed = total[:, 1:]
    return summed, summed[:, -1]
