"""Causal sparse attention over a union of patterns, as a sequence layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerOut, SequenceLayer
from recollect.core.types import Aux
from recollect.layers.moments import Moments, Past
from recollect.layers.sparse_options import SparseOptions
from recollect.ops.attention_map import AttentionInputs
from recollect.ops.hashing import (
    draw_planes,
    hash_loss,
    plane_code,
    probed_buckets,
    project,
    read_buckets,
    soft_code,
)
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Pattern, Sink, Window, find
from recollect.ops.scan import accumulator_dtype
from recollect.ops.selection import selection_divergence, selection_loss
from recollect.ops.sparse_attention import Buckets, Memory, init_memory, memory_bytes, sparse_attention
from recollect.ops.teacher import attend_fully, teach


class SparseAttention(SequenceLayer):
    """Attention in which position i sees the keys its patterns admit (``ops.patterns``), and nothing else.

    y_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt N) v_j, with q, k one linear map of x and no positional encoding,
    as in HAX (arXiv 2507.00449, section 4). ``project=False`` takes the inputs themselves as values and returns the
    heads as they are: the form in which HAX joins it to a state-space model.

    ``KeySelection`` scores a key by a small network of the key and the normalised sum of the queries up to it. What is
    discrete, buckets and selection, is taught by the losses that the options name, returned as ``aux["hash"]`` and
    ``aux["selection"]`` in training. No statistic over the sequence enters the hash. Time O(L (K + log L)), memory
    O(L K), and in training what those losses cost.

    With ``dense`` set (``set_dense``), a layer in training reads all the past instead of what its patterns admit;
    scores, buckets and their losses stay. In eval mode it makes no difference. A state belongs to the mode it was made
    in.
    """

    dense: bool = False

    @dataclass(frozen=True)
    class Config(SparseOptions, kind="sparse"):
        """``SparseOptions``; values have width ``d_model / n_heads``, projected from the inputs with ``project``."""

        project: bool = True
        d_read: int = 0
        """Columns of the input after the first ``d_model``: queries and keys are made from these, values from the
        others; 0: all from the same. With ``qk="dual"`` queries' stand before keys'."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.qk == "dual" and not self.d_read:
                raise ConfigError(f"{self.kind}: qk=dual takes the queries and keys of a mixer; use it within hax")
            if self.d_read < 0:
                raise ConfigError(f"{self.kind}: d_read must not be negative, got {self.d_read}")
            if self.qk == "dual" and self.d_read != 2 * self.n_heads * self.d_key:
                raise ConfigError(
                    f"{self.kind}: qk=dual reads {self.d_read // 2} numbers for queries and as many for keys; "
                    f"n_heads * d_key must be that, got {self.n_heads} * {self.d_key}"
                )
            if self.qk == "dual" and self.init_std is not None:
                raise ConfigError(f"{self.kind}: qk=dual starts as the identity; leave init_std out")
            if self.d_model % self.n_heads:
                raise ConfigError(f"{self.kind}: d_model {self.d_model} is not divisible by n_heads {self.n_heads}")

        @classmethod
        def tiny(cls) -> Self:
            return cls(d_model=8, d_key=4, patterns=(Lsh(4, n_bits=2), KeySelection(3)))

        @classmethod
        def declared(cls) -> Mapping[str, Self]:
            every = (Window(3), Sink(2), Dilated(2, stride=5), KeySelection(3), Lsh(4, n_bits=2, n_rounds=2))
            columns = Lsh(4, n_bits=2, n_rounds=2, rule="argmax")
            hax = (Lsh(4, n_bits=2, n_rounds=2), KeySelection(3))
            exploring = cls(d_model=8, d_key=4, n_heads=2, patterns=hax, planes="projected", explore=5)
            return {
                "tiny": cls.tiny(),
                "full": cls(d_model=8, d_key=4, patterns=(Full(),)),
                "window": cls(d_model=8, d_key=4, patterns=(Window(5),)),
                "lsh": cls(d_model=8, d_key=4, patterns=(Lsh(3, n_bits=2),)),
                "every-heads": cls(d_model=8, d_key=4, n_heads=2, patterns=every),
                "unprojected": cls(d_model=8, d_key=4, patterns=(Dilated(3, stride=4),), project=False),
                "shared-l2-redrawn": cls(
                    d_model=8,
                    d_key=4,
                    n_heads=2,
                    patterns=(columns, KeySelection(3)),
                    qk="shared",
                    normalise="l2",
                    learn_scale=True,
                    planes="redrawn",
                    selection="kl",
                ),
                "gate-learned": cls(
                    d_model=8,
                    d_key=4,
                    patterns=(Lsh(3, n_bits=2), KeySelection(3)),
                    include_self=True,
                    scale=0.7,
                    planes="learned",
                    selection="gate+kl",
                ),
                "projected-exploring": exploring,
                "probed": cls(
                    d_model=8, d_key=4, patterns=(Lsh(6, n_bits=3, n_rounds=3, rounds="probed"),), planes="projected"
                ),
                "probed-argmax": cls(
                    d_model=8,
                    d_key=4,
                    n_heads=2,
                    patterns=(Lsh(4, n_bits=2, n_rounds=2, rule="argmax", rounds="probed"),),
                ),
                "follow": cls(
                    d_model=8, d_key=4, patterns=(Lsh(3, n_bits=2), KeySelection(3)), qk="shared", follow=True
                ),
                "follow-span": replace(exploring, span=3, follow=True),
                "sketch": cls(
                    d_model=8, d_key=4, patterns=(Lsh(3, n_bits=2), KeySelection(3)), qk="sketch", span=2, follow=True
                ),
                "span": cls(d_model=8, d_key=4, patterns=(Window(5),), span=4),
                "gate-heads": cls(
                    d_model=8, d_key=3, n_heads=2, patterns=(KeySelection(4),), learn_scale=True, selection="gate"
                ),
            }

        def state_bytes(self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seen: int = 0) -> int:
            """Bytes of memory slots, of the running query sum with key selection, and of the moments looked back on."""
            slots = memory_bytes(
                self.union, batch, self.n_heads, self.key_width, self.d_model // self.n_heads, dtype.itemsize, seen
            )
            summed = self.d_key if find(self.patterns, KeySelection) else 0
            looked_back = (self.span - 1 + self.follow) * (self.d_read or self.d_model) * dtype.itemsize
            return slots + batch * (self.n_heads * summed * accumulator_dtype(dtype).itemsize + looked_back)

    class State(NamedTuple):
        """The remembered keys, the sum of the segment's queries (B, H, N) when key selection needs it, and the inputs
        that the next queries and keys are still made of.
        """

        memory: Memory
        query_sum: Tensor
        past: Past

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        heads, d_key = config.n_heads, config.d_key
        self.d_value = config.d_model // heads
        self.moments = Moments(config.d_read or config.d_model, config.span, config.follow)
        n_projections = 1 if config.one_map else 2
        self.to_qk = nn.Linear(config.d_read or config.d_model, n_projections * heads * d_key, bias=False)
        if config.qk == "dual":
            nn.init.eye_(self.to_qk.weight)
        if config.init_std is not None:
            nn.init.normal_(self.to_qk.weight, std=config.init_std)
        if config.qk == "sketch":
            self.to_qk.requires_grad_(False)
            self.moments.requires_grad_(False)
        self.to_v = nn.Linear(config.d_model, config.d_model, bias=False) if config.project else nn.Identity()
        self.out = nn.Linear(config.d_model, config.d_model, bias=False) if config.project else nn.Identity()
        if config.learn_scale:
            self.log_scale = nn.Parameter(torch.full((heads,), config.start_scale).log())
        self.lsh = find(config.patterns, Lsh)
        self.key_selection = find(config.patterns, KeySelection)
        self.planes: Tensor
        self.plane_seed: Tensor
        self.plane_draws: Tensor
        if self.lsh is not None and config.planes == "projected":
            width = config.d_model + config.d_read if config.qk == "dual" else config.d_read or config.d_model
            self.to_hash = nn.Linear(width, 2 * heads * self.lsh.n_hashes * self.lsh.n_planes)
        elif self.lsh is not None:
            planes = draw_planes(d_key, heads, self.lsh.n_hashes, self.lsh.n_planes)
            if config.planes == "learned":
                self.planes = nn.Parameter(planes)
            else:
                self.register_buffer("planes", planes)
        self._draw: tuple[int, int] | None = None
        if config.planes == "redrawn":
            self.register_load_state_dict_post_hook(self._forget_draw)
            self.register_buffer("plane_seed", torch.randint(2**62, ()))
            self.register_buffer("plane_draws", torch.zeros((), dtype=torch.int64))
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
        memory = init_memory(self.union, batch, c.n_heads, c.key_width, self.d_value, device=device, dtype=dtype)
        width = c.d_key if self.key_selection else 0
        query_sum = torch.zeros(batch, c.n_heads, width, device=device, dtype=accumulator_dtype(dtype))
        return self.State(memory, query_sum, self.moments.init_state(batch, device=device, dtype=dtype))

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> LayerOut:
        if self.training and self.config.planes == "redrawn":
            self._next_draw()  # pyright: ignore[reportCallIssue] the decorator is untyped
        return self._attend(x, state, reset, taught=self.training)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """One query against its own slots: O(K (N + P)) for a budget of K keys, and one copy of the memory."""
        out = self._attend(x[:, None], state, None if reset is None else reset[:, None], taught=False)
        return out.y[:, 0], out.state

    def attention_inputs(self, x: Tensor) -> AttentionInputs:
        """What ``forward`` attends with over fresh sequences x (B, L, D), as ``ops.attention_map`` takes it."""
        c = self.config
        asks, tells, _ = self.moments(self._read(x), None, None)
        q, k, scale = self._queries_and_keys(asks, tells)
        buckets, score = None, None
        if self.lsh is not None:
            buckets, _ = self._hash(x, asks, tells, q, k)
        if self.key_selection is not None:
            score = self._score(k, F.normalize(running_sum(q, None, None)[0], dim=-1).to(k.dtype))
            if c.gated:
                q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
                k = torch.cat([k, F.logsigmoid(score)[..., None] / scale], -1)
        return AttentionInputs(q, k, c.union, scale, score, buckets)

    def current_planes(self) -> Tensor:
        """Hash planes in force, (H, N, n_rounds, n_planes): those drawn first unless redrawn ones are being trained on.

        Draw number ``plane_draws`` under ``plane_seed``, both saved with the parameters: training that is resumed draws
        what it would have drawn. Drawn on the CPU, so that every device gets the same.
        """
        if not (self.training and self.config.planes == "redrawn"):
            return self.planes
        return self._redrawn()  # pyright: ignore[reportCallIssue, reportReturnType] the decorator is untyped

    @torch.compiler.disable  # a number that changes at every call would be compiled for anew
    def _next_draw(self) -> None:
        self._draw = None if self._draw is None else (self._draw[0], self._draw[1] + 1)
        self.plane_draws.add_(1)

    @staticmethod
    def _forget_draw(layer: SparseAttention, _: Any) -> None:
        layer._draw = None

    @torch.compiler.disable
    def _redrawn(self) -> Tensor:
        heads, d_key, n_rounds, n_planes = self.planes.shape
        if self._draw is None:  # read once: a GPU would have to be waited for at every step
            self._draw = int(self.plane_seed), int(self.plane_draws)
        generator = torch.Generator().manual_seed(sum(self._draw))
        return draw_planes(d_key, heads, n_rounds, n_planes, generator).to(self.planes)

    @property
    def union(self) -> tuple[Pattern, ...]:
        """The patterns in force: ``Full`` alone while dense."""
        return (Full(),) if self.dense and self.training else self.config.union

    def _attend(self, x: Tensor, state: State | None, reset: Tensor | None, *, taught: bool) -> LayerOut:
        c = self.config
        aux: Aux = {}
        asks, tells, past = self.moments(self._read(x), None if state is None else state.past, reset)
        q, k, scale = self._queries_and_keys(asks, tells)
        v = self.to_v(x[..., : c.d_model]).unflatten(-1, (c.n_heads, self.d_value))
        explorers = self._explorers(x) if taught else None
        buckets = None
        if self.lsh is not None:
            buckets, codes = self._hash(x, asks, tells, q, k)
            if taught and codes is not None:
                aux["hash"] = self._hash_loss(q.detach(), k.detach(), codes, explorers, reset, scale)
        score, query_sum = None, x.new_zeros(x.shape[0], c.n_heads, 0, dtype=accumulator_dtype(x.dtype))
        if self.key_selection is not None:
            summed = q if c.gated else q.detach()
            seen, query_sum = running_sum(summed, None if state is None else state.query_sum, reset)
            seen = F.normalize(seen, dim=-1).to(k.dtype)
            score = self._score(k if c.gated else k.detach(), seen)
            if taught and c.selection_loss is not None:
                pupil = self._score(k.detach(), seen.detach()) if c.gated else score
                aux["selection"] = self._selection_loss(q.detach(), k.detach(), pupil, scale, reset)
            if c.gated:
                q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
                k = torch.cat([k, F.logsigmoid(score)[..., None] / scale], -1)
        y, memory = sparse_attention(
            q,
            k,
            v,
            self.union,
            memory=None if state is None else state.memory,
            reset=reset,
            score_BLH=score,
            buckets=buckets,
            scale=scale,
        )
        if explorers is not None and not self.dense:
            attention = attend_fully(q, k, explorers, reset=reset, scale=scale).attention_BHnL
            read = torch.einsum("bhns,bshp->bnhp", attention.to(v.dtype), v)
            y = y.index_copy(1, explorers, read.to(y.dtype))
        return LayerOut(self.out(y.flatten(-2)), self.State(memory, query_sum, past), aux)

    def _explorers(self, x: Tensor) -> Tensor | None:
        """Positions (n,) of the queries that read everything this time, in order."""
        if not self.config.explore:
            return None
        return torch.randperm(x.shape[1], device=x.device)[: self.config.explore].sort().values

    def _hash(
        self, x: Tensor, asks: Tensor, tells: Tensor, q: Tensor, k: Tensor
    ) -> tuple[Buckets, tuple[Tensor, Tensor] | None]:
        """The buckets of queries and keys, and the projections that gave them where a loss is to train them: of what
        they are made of, or of all of x where that is a mixer's own.
        """
        if self.config.qk == "dual":
            asks = tells = x
        assert self.lsh is not None
        c = self.config
        if c.planes == "projected":
            shape = (2, c.n_heads, self.lsh.n_hashes, self.lsh.n_planes)
            projected = self._two(self.to_hash, asks.detach(), tells.detach()).unflatten(-1, shape)
            q_code, k_code = projected.unbind(2)
            return self._buckets(q_code, k_code), (q_code, k_code)
        planes = self.current_planes()
        buckets = self._buckets(project(q, planes), project(k, planes))
        if c.planes != "learned":
            return buckets, None
        return buckets, (plane_code(q.detach(), planes), plane_code(k.detach(), planes))

    def _buckets(self, q_code: Tensor, k_code: Tensor) -> Buckets:
        """Where queries look and where keys lie, round by round."""
        assert self.lsh is not None
        rule, n_rounds = self.lsh.rule, self.lsh.n_rounds
        if self.lsh.rounds == "probed":
            lies = read_buckets(k_code, rule).expand(-1, -1, -1, n_rounds)
            return Buckets(probed_buckets(q_code[..., 0, :], rule, n_rounds), lies)
        return Buckets(read_buckets(q_code, rule), read_buckets(k_code, rule))

    def _hash_loss(
        self,
        q: Tensor,
        k: Tensor,
        codes: tuple[Tensor, Tensor],
        explorers: Tensor | None,
        reset: Tensor | None,
        scale: float,
    ) -> Tensor:
        assert self.lsh is not None
        if explorers is None:
            taught = teach(q, k, n=self._samples(self.lsh.n_keys), reset=reset, scale=scale)
        else:
            taught = attend_fully(q, k, explorers, reset=reset, scale=scale)
        rule = self.lsh.rule
        q_code, k_code = (soft_code(code, rule) for code in codes)
        return hash_loss(taught, q_code, k_code, rule, n_keys=self.lsh.n_keys // self.lsh.n_rounds)

    def _read(self, x: Tensor) -> Tensor:
        """What queries and keys are made from."""
        return x[..., self.config.d_model :] if self.config.d_read else x

    def _two(self, linear: nn.Linear, asks: Tensor, tells: Tensor, *, shared: bool = False) -> Tensor:
        """Of a linear map the first half of what ``asks`` gives, beside the other half of what ``tells`` gives; where
        it is ``shared``, all of both, and once where they are one.
        """
        if asks is tells:
            return linear(asks)
        if shared:
            return torch.cat([linear(asks), linear(tells)], -1)
        of_asks, of_tells = linear.weight.chunk(2)
        bias = cast("Tensor | None", linear.bias)  # declared without the None
        for_asks, for_tells = (None, None) if bias is None else bias.chunk(2)
        return torch.cat([F.linear(asks, of_asks, for_asks), F.linear(tells, of_tells, for_tells)], -1)

    def _queries_and_keys(self, asks: Tensor, tells: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """q, k (B, L, H, N) and the factor on their products; a learned one is already in q."""
        c = self.config
        tells = asks if tells is None else tells
        projected = self._two(self.to_qk, asks, tells, shared=c.one_map)
        projected = projected.unflatten(-1, (-1, c.n_heads, c.d_key))
        if c.normalise == "l2":
            # Under autocast norms are float32, and would make the queries and keys so.
            projected = F.normalize(projected, dim=-1).to(projected.dtype)
        q, k = projected[:, :, 0], projected[:, :, -1]
        return (q * self.log_scale.exp()[:, None].to(q.dtype), k, 1.0) if c.learn_scale else (q, k, c.start_scale)

    def _score(self, k_BLHN: Tensor, seen_BLHN: Tensor) -> Tensor:
        return self.scorer(torch.cat([k_BLHN, seen_BLHN], -1)).squeeze(-1)

    def _samples(self, n_keys: int) -> int:
        return max(32, 2 * n_keys) if self.config.samples is None else self.config.samples

    def _selection_loss(self, q: Tensor, k: Tensor, score: Tensor, scale: float, reset: Tensor | None) -> Tensor:
        assert self.key_selection is not None
        n = self._samples(self.key_selection.n_keys)
        if self.config.selection_loss == "kl":
            return selection_divergence(q, k, score, n=n, scale=scale, reset=reset)
        target = self.config.selection_target
        return selection_loss(q, k, score, n=n, scale=scale, reset=reset, target=target)


def set_dense(model: nn.Module, dense: bool) -> None:
    """Let every sparse attention within ``model`` read all the past while it trains, or its own patterns again."""
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.dense = dense


def running_sum(x_BLHN: Tensor, start_BHN: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over each segment up to and including every position, and the last one to carry on from. At least float32."""
    x_BLHN = x_BLHN.to(accumulator_dtype(x_BLHN.dtype))
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
