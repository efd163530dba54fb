"""A two-layer model that answers joint recall exactly, with every weight written down and none trained.

The constructive half of HAX's theory (arXiv 2507.00449, propositions 3.2 and C.1), as a program: a state-space layer
that overwrites some coordinates of its state and keeps the others, then attention over hash buckets. For n cells the
recurrent state has O(log n) numbers, a query reads O(log n) keys, and a sequence takes O(n log^2 n) time.
``docs/theory.md`` goes through it step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config as BaseConfig
from recollect.core.errors import ConfigError
from recollect.core.layer import LayerOut, SequenceLayer
from recollect.core.seeding import Streams
from recollect.core.state import where_reset
from recollect.core.types import Aux
from recollect.layers.sparse import SparseAttention
from recollect.models.codes import (
    FLAG,
    Floats,
    code_width,
    crowd,
    digit_planes,
    draw_codes,
    draw_planes,
    log2_ceil,
    overlap,
)
from recollect.ops.patterns import Lsh
from recollect.ops.scan import scan

BOS, SEP, FIRST_SYMBOL = 1, 4, 10
"""Token ids as in ``tasks.joint_recall``: values from ``FIRST_SYMBOL`` on, then keys, then contexts."""

PlaneRule = Literal["random", "digits"]


class OverwriteState(NamedTuple):
    """What was last written into every coordinate, (B, D)."""

    h: Tensor


class Overwrite(SequenceLayer):
    """h_t = a_t * h_{t-1} + (1 - a_t) * x_t with a_t = 1 where x_t is 0 and 0 elsewhere, per coordinate; y_t = h_t.

    A diagonal state-space recurrence with input-dependent gates, run by ``ops.scan``. Its gates are exactly 0 and 1.
    Those of a selective state-space model (Mamba, arXiv 2312.00752, theorem 1: a = 1 - sigmoid(linear(x))) only come
    near, and here the linear map would read the kind of token from extra coordinates; ``leak`` is by how much they
    miss: a_t = 1 - leak where x_t is 0 and leak elsewhere. No parameters. O(L D) time and memory, a state of D numbers.
    """

    def __init__(self, d_model: int, leak: float = 0.0) -> None:
        super().__init__()
        self.d_model = d_model
        self.leak = leak

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> OverwriteState:
        return OverwriteState(torch.zeros(batch, self.d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor, state: OverwriteState | None = None, *, reset: Tensor | None = None) -> LayerOut:
        a_BLD = self._gate(x)
        h_BLD, h_BD = scan(a_BLD, (1 - a_BLD) * x, None if state is None else state.h, reset=reset)
        return LayerOut(h_BLD, OverwriteState(h_BD), {})

    def step(self, x: Tensor, state: OverwriteState, *, reset: Tensor | None = None) -> tuple[Tensor, OverwriteState]:
        if reset is not None:
            state = where_reset(reset, self.state_like(x), state)
        a_BD = self._gate(x)
        h_BD = a_BD * state.h + (1 - a_BD) * x
        return h_BD, OverwriteState(h_BD)

    def _gate(self, x: Tensor) -> Tensor:
        return torch.where(x == 0, 1 - self.leak, self.leak).to(x.dtype)


class ConstructedState(NamedTuple):
    """The recurrent state, O(log n) numbers, and what attention remembers, at most O(n log n) keys."""

    written: OverwriteState
    memory: SparseAttention.State


class ConstructedRecall(nn.Module):
    """Token ids to logits, with weights that answer every query of joint recall for any table of these sizes.

    Embedding, ``Overwrite``, the layer ``sparse`` with hashing alone, and a head tied to the embedding. Coordinates:
    one code per level, two flags, a constant, one code for the value. A token writes the code of its own level and the
    flag *kind* (+ for values, - for all else); ``bos`` and ``sep`` write the flag *part* (+ told, - asked). So the
    state at a told value is (context, key, +, +, value), at an asked key (context, key, -, -, ...), and attention has

        key    (context, key, kind, part)        query  (context, key, +, +)        value  the value's code

    which makes the told value's key equal to the query, hence of the same bucket; anything else in the bucket is
    farther by ``gap`` and suppressed by ``scale``. Answers standing among the questions have part - and are never read.

    Exactly: when built, codes, planes and buckets are checked for every cell and every order of telling; a size for
    which that fails is a ConfigError. It holds for sequences that begin with ``bos`` and tell and ask every cell once.
    """

    @dataclass(frozen=True)
    class Config(BaseConfig, kind="constructed-recall"):
        """``levels``: vocabulary sizes, outermost contexts first and keys last; two for joint recall, one for plain
        associative recall, more for contexts within contexts.

        ``planes``: "random" hash planes as in the proposition, ceil(log2 n) of them, or "digits", planes that read the
        binary numbers that codes then begin with: every cell has a bucket of its own, and the keys per query do not
        grow at all. ``n_keys`` and ``n_bits``, given, replace the formulas.

        ``verify=False`` builds what may fail, to see it fail; ``leak`` is that of ``Overwrite``, and exactness is
        promised for 0 only.
        """

        levels: tuple[int, ...] = (16, 16)
        n_values: int = 16
        planes: PlaneRule = "random"
        n_keys: int | None = None
        n_bits: int | None = None
        leak: float = 0.0
        seed: int = 0
        verify: bool = True

        def __post_init__(self) -> None:
            if not self.levels or min(self.levels) < 1 or self.n_values < 1:
                raise ConfigError(
                    f"{self.kind}: levels and n_values count symbols, at least 1 each; "
                    f"got {self.levels} and {self.n_values}"
                )
            if self.planes not in get_args(PlaneRule):
                raise ConfigError(f"{self.kind}: planes are 'random' or 'digits', not {self.planes!r}")
            if self.planes == "digits" and self.n_bits is not None:
                raise ConfigError(f"{self.kind}: n_bits is for random planes; digits decide it themselves")
            if not 0 <= self.leak < 0.5:
                raise ConfigError(f"{self.kind}: leak must be in [0, 0.5), got {self.leak}")

        @property
        def n_cells(self) -> int:
            """n, the cells of a table."""
            return math.prod(self.levels)

        @property
        def bits(self) -> int:
            """Hash bits: ceil(log2 n), fewer than 2 n buckets; with digits, the sum of ceil(log2) over the levels."""
            if self.n_bits is not None:
                return self.n_bits
            return max(1, sum(map(log2_ceil, self.levels)) if self.planes == "digits" else log2_ceil(self.n_cells))

        @property
        def keys(self) -> int:
            """Keys per query K: 6 ceil(log2 n) + 8; with digits 3 w + 3 for w levels, whatever n."""
            if self.n_keys is not None:
                return self.n_keys
            return 3 * len(self.levels) + 3 if self.planes == "digits" else 6 * log2_ceil(self.n_cells) + 8

        @property
        def d_key(self) -> int:
            """Width of queries and keys: the codes of all levels and two flags."""
            return sum(code_width(n) for n in self.levels) + 2

        @property
        def d_model(self) -> int:
            """Numbers of recurrent state: queries' and keys' coordinates, a constant and the value's code; O(log n)."""
            return self.d_key + 1 + code_width(self.n_values)

        @property
        def slots(self) -> int:
            """Keys that attention can remember, K 2^bits < 2 K n."""
            return self.keys << self.bits

        @property
        def vocab_size(self) -> int:
            """As ``JointRecall.vocab_size`` for a task of these sizes."""
            return FIRST_SYMBOL + self.n_values + sum(self.levels)

    State: ClassVar = ConstructedState

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        rng = Streams(config.seed).numpy("init", "constructed-recall", *config.levels, config.n_values)
        numbered = config.planes == "digits"
        levels = [draw_codes(rng, n, numbered=numbered) for n in config.levels]
        values = draw_codes(rng, config.n_values)
        n_keys = config.keys if config.verify else None
        if numbered:
            planes = digit_planes(levels)
            found = crowd(levels, planes)
            if n_keys is not None and found.worst > n_keys:
                raise ConfigError(f"{config.kind}: a bucket may hold {found.worst} keys; raise n_keys from {n_keys}")
        else:
            planes, found = draw_planes(rng, levels, config.bits, n_keys)
        self.crowd = found
        """Keys of a sequence that can be in a bucket that is asked for, over every order of telling."""
        nearest = max(overlap(codes) for codes in levels)
        self.gap = min(1 - nearest, 2 * FLAG**2)
        """By how much a query's product with its told value exceeds that with any other key."""
        self.scale = (math.log(config.keys) + 7) / self.gap
        """So large that all other keys of a full bucket together weigh less than exp(-7), about 0.001."""
        self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(_embedding(levels, values)).float())
        self.overwrite = Overwrite(config.d_model, config.leak)
        patterns = (Lsh(config.keys, config.bits),)
        with torch.random.fork_rng(devices=[]):  # the layer draws weights that are replaced at once
            self.attention = SparseAttention(
                SparseAttention.Config(config.d_model, config.d_key, patterns=patterns, scale=self.scale)
            )
        self._set_attention(torch.from_numpy(planes).float())
        self.requires_grad_(False)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConstructedState:
        like = self.embedding.weight
        device, dtype = device or like.device, dtype or like.dtype
        return ConstructedState(
            self.overwrite.init_state(batch, device=device, dtype=dtype),
            self.attention.init_state(batch, device=device, dtype=dtype),
        )

    def hidden(
        self, tokens: Tensor, state: ConstructedState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, ConstructedState, Aux]:
        """What was found for tokens (B, L), as (B, L, D) with the value's code in its place. As ``LanguageModel``."""
        written = self.overwrite(self.embedding(tokens), None if state is None else state.written, reset=reset)
        found = self.attention(written.y, None if state is None else state.memory, reset=reset)
        return found.y, ConstructedState(written.state, found.state), {}

    def forward(
        self, tokens: Tensor, state: ConstructedState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, ConstructedState]:
        """Logits (B, L, V) after each of tokens (B, L), and the state to go on from. O(n log^2 n) time for n cells."""
        h, state, _ = self.hidden(tokens, state, reset=reset)
        return self.head(h), state

    def step(
        self, token: Tensor, state: ConstructedState, *, reset: Tensor | None = None
    ) -> tuple[Tensor, ConstructedState]:
        """Logits (B, V) after one more token (B,)."""
        h, written = self.overwrite.step(self.embedding(token), state.written, reset=reset)
        found, memory = self.attention.step(h, state.memory, reset=reset)
        return self.head(found), ConstructedState(written, memory)

    def head(self, h: Tensor) -> Tensor:
        """h E^T: the right value's logit is about 1, every other's at most about ``codes.OVERLAP``."""
        return F.linear(h, self.embedding.weight)

    def _set_attention(self, planes: Tensor) -> None:
        d_key, d_model = self.config.d_key, self.config.d_model
        kind, part, one, value = d_key - 2, d_key - 1, d_key, slice(d_key + 1, d_model)
        to_q, to_k = torch.zeros(d_key, d_model), torch.eye(d_key, d_model)
        to_q[:kind, :kind] = torch.eye(kind)
        to_q[[kind, part], one] = 1
        only_value = torch.zeros(d_model)
        only_value[value] = 1
        with torch.no_grad():
            self.attention.to_qk.weight.copy_(torch.cat([to_q, to_k]))
            maps = (self.attention.to_v, torch.diag(only_value)), (self.attention.out, torch.eye(d_model))
            for linear, weight in maps:
                assert isinstance(linear, nn.Linear)
                linear.weight.copy_(weight)
            self.attention.planes.copy_(planes[None, :, None])


def build(n_contexts: int, n_keys: int, n_values: int = 16) -> ConstructedRecall:
    """The construction for ``JointRecall`` with ids for ``n_contexts`` x ``n_keys`` tables of ``n_values`` values."""
    return ConstructedRecall(ConstructedRecall.Config((n_contexts, n_keys), n_values))


def _embedding(levels: list[Floats], values: Floats) -> Floats:
    """What every token writes, (V, D): zero where it writes nothing."""
    d_key = sum(codes.shape[1] for codes in levels) + 2
    kind, part, one = d_key - 2, d_key - 1, d_key
    first_level = FIRST_SYMBOL + len(values)
    table = np.zeros((first_level + sum(len(codes) for codes in levels), d_key + 1 + values.shape[1]))
    table[:, kind], table[:, one] = -FLAG, FLAG
    table[BOS, part], table[SEP, part] = FLAG, -FLAG
    table[FIRST_SYMBOL:first_level, kind] = FLAG
    table[FIRST_SYMBOL:first_level, d_key + 1 :] = values
    row, column = first_level + sum(len(codes) for codes in levels), 0
    for codes in levels:  # ids run from the innermost level outwards, coordinates from the outermost inwards
        row -= len(codes)
        table[row : row + len(codes), column : column + codes.shape[1]] = codes
        column += codes.shape[1]
    return table
