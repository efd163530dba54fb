"""Causal sparse attention over a union of patterns, with a bounded memory between calls.

    y_i = sum_{j in A_i} softmax_j(q_i . k_j * scale) v_j          A_i: the union of the patterns' key sets

A query with no admissible key outputs zero. A reset empties every pattern's memory before its position. ``forward``
over a whole sequence and one call per position give the same result: what later queries may need is handed over in a
``Memory`` of as many slots as the patterns declare.

Three executions of the same sets (``dispatch.sparse_attention_path`` picks one):

* *reference*: the definitions written out as L x L masks; only for tests, no memory.
* *dense*: lifetimes (see ``lifetimes``) compared into one L x S mask; fastest for short sequences.
* *tiled*: never an L x L array. Time O(L (K + CHUNK) + S log S), memory O(L (K + CHUNK)) for budget K.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.ops import dispatch, tiled_attention
from recollect.ops.attend import attend, merge
from recollect.ops.lifetimes import Timeline, bucket_deaths, slot_deaths, timeline
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Pattern, Sink, Window, find, memory_slots
from recollect.ops.scan import accumulator_dtype


class Memory(NamedTuple):
    """What sparse attention carries between calls. M slots, ordered by time; empty slots hold position -1 and zeros."""

    k: Tensor  # (B, H, M, N)
    v: Tensor  # (B, H, M, P)
    position: Tensor  # (B, H, M) int64, within the segment
    score: Tensor  # (B, H, M) with KeySelection, (B, H, 0) without
    bucket: Tensor  # (B, H, M, n_rounds) int64 with Lsh, (B, H, M, 0) without
    next_position: Tensor  # (B,) int64, within the segment


class Buckets(NamedTuple):
    """Hash buckets of queries and keys, (B, L, H, n_rounds) int64 each (``hashing.sign_buckets``)."""

    q: Tensor
    k: Tensor


def init_memory(
    patterns: tuple[Pattern, ...],
    batch: int,
    n_heads: int,
    d_key: int,
    d_value: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Memory:
    """A memory in which nothing is remembered. With ``Full`` it has a slot per position of the longest open segment."""
    slots = memory_slots(patterns) or 0
    lsh = find(patterns, Lsh)
    shape = (batch, n_heads, slots)
    scored = slots if find(patterns, KeySelection) else 0
    return Memory(
        k=torch.zeros(*shape, d_key, device=device, dtype=dtype),
        v=torch.zeros(*shape, d_value, device=device, dtype=dtype),
        position=torch.full(shape, -1, device=device, dtype=torch.int64),
        score=torch.zeros(batch, n_heads, scored, device=device, dtype=dtype),
        bucket=torch.zeros(*shape, lsh.n_rounds if lsh else 0, device=device, dtype=torch.int64),
        next_position=torch.zeros(batch, device=device, dtype=torch.int64),
    )


def memory_bytes(
    patterns: tuple[Pattern, ...], batch: int, n_heads: int, d_key: int, d_value: int, itemsize: int, seen: int
) -> int:
    """Bytes of ``Memory`` after ``seen`` positions without a reset; constant unless ``Full`` is among the patterns."""
    bounded = memory_slots(patterns)
    slots = seen if bounded is None else bounded
    lsh = find(patterns, Lsh)
    scored = 1 if find(patterns, KeySelection) else 0
    slot = itemsize * (d_key + d_value + scored) + 8 * (1 + (lsh.n_rounds if lsh else 0))
    return batch * (n_heads * slots * slot + 8)


def sparse_attention(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    *,
    memory: Memory | None = None,
    reset: Tensor | None = None,
    score_BLH: Tensor | None = None,
    buckets: Buckets | None = None,
    scale: float | None = None,
    path: str = "auto",
) -> tuple[Tensor, Memory]:
    """Attend causally over the union of ``patterns``; returns y (B, L, H, P) and the memory after the last position.

    ``memory`` None means nothing is remembered; ``reset`` (B, L) bool acts before its position. ``score_BLH`` is
    required by ``KeySelection`` and may depend on positions up to its own only; ``buckets`` is required by ``Lsh``.
    ``scale`` defaults to N^-1/2. ``path`` is "auto", "dense" or "tiled". Gradients reach q, k, v and the memory's k
    and v; choosing the sets is not differentiable.
    """
    batch, length, heads, d_key = q_BLHN.shape
    d_value = v_BLHP.shape[-1]
    scale = 1 / math.sqrt(d_key) if scale is None else scale
    n_memory = 0 if memory is None else memory.position.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q_BLHN, k_BLHN, v_BLHP))
    bucket = None if buckets is None else buckets.k.transpose(1, 2)
    score = None if score_BLH is None else score_BLH.detach().transpose(1, 2)
    if memory is None:
        start = torch.zeros(batch, dtype=torch.int64, device=q.device)
        memory_position = torch.empty(batch, heads, 0, dtype=torch.int64, device=q.device)
    else:
        start, memory_position = memory.next_position, memory.position
        k, v = torch.cat([memory.k, k], 2), torch.cat([memory.v, v], 2)
        score = None if score is None else torch.cat([memory.score, score], 2)
        bucket = None if bucket is None else torch.cat([memory.bucket, bucket], 2)

    time = timeline(length, n_memory, start, reset)
    sets = _key_sets(patterns, time, memory_position, score, bucket, None if buckets is None else buckets.q)
    chosen = dispatch.sparse_attention_path(length, n_memory, patterns) if path == "auto" else path
    # Sums of exponentials need float32 even where autocast would take half precision.
    with torch.autocast(q.device.type, enabled=False):
        rows = (_rows(q), _rows(k), _rows(v))
        if chosen == "dense":
            partial = attend(*rows, sets.admits(), scale)
        elif find(patterns, Full):
            partial = tiled_attention.full(*rows, sets, scale)
        else:
            partial = merge(tiled_attention.passes(*rows, sets, patterns, scale))
        y = partial.normalised().to(v.dtype).view(batch, heads, length, d_value).transpose(1, 2)
    return y, _remember(patterns, time, k, v, memory_position, score, bucket, sets)


def _rows(x_BHSN: Tensor) -> Tensor:
    return x_BHSN.flatten(0, 1).to(accumulator_dtype(x_BHSN.dtype))


class KeySets(NamedTuple):
    """The admitted (query, source) pairs, as intervals. Rows R = B x H; see ``lifetimes``."""

    time: Timeline
    slot_death_RS: Tensor
    round_deaths: tuple[Tensor, ...]  # one (R, S) per hash round
    q_bucket_RLK: Tensor | None  # (R, L, n_rounds)
    k_bucket_RSK: Tensor | None

    def admits(self) -> Tensor:
        """The whole mask, (R, L, S): for short sequences and tests."""
        query = torch.arange(self.time.length, device=self.slot_death_RS.device)[:, None]
        arrived = self.time.arrival_S <= query
        mask = query < self.slot_death_RS[:, None]
        for r, death in enumerate(self.round_deaths):
            assert self.q_bucket_RLK is not None
            assert self.k_bucket_RSK is not None
            same = self.q_bucket_RLK[:, :, None, r] == self.k_bucket_RSK[:, None, :, r]
            mask = mask | (same & (query < death[:, None]))
        return mask & arrived

    def survivors(self) -> Tensor:
        """Sources that the query after the last one might still be given, (R, S) bool."""
        alive = self.slot_death_RS >= self.time.length
        for death in self.round_deaths:
            alive = alive | (death >= self.time.length)
        return alive


def _key_sets(
    patterns: tuple[Pattern, ...],
    time: Timeline,
    memory_position_BHM: Tensor,
    score_BHS: Tensor | None,
    bucket_BHSK: Tensor | None,
    q_bucket_BLHK: Tensor | None,
) -> KeySets:
    death = slot_deaths(patterns, time, memory_position_BHM, score_BHS).flatten(0, 1)
    lsh = find(patterns, Lsh)
    if lsh is None:
        return KeySets(time, death, (), None, None)
    assert bucket_BHSK is not None, "Lsh needs the buckets of queries and keys"
    assert q_bucket_BLHK is not None, "Lsh needs the buckets of queries and keys"
    k_bucket = bucket_BHSK.flatten(0, 1)
    q_bucket = q_bucket_BLHK.transpose(1, 2).flatten(0, 1)
    rows = death.shape[0]
    valid = torch.ones_like(death, dtype=torch.bool)
    valid[:, : time.n_memory] = (memory_position_BHM >= 0).flatten(0, 1)
    end = time.end_BS.repeat_interleave(rows // time.end_BS.shape[0], 0)
    per_round = lsh.n_keys // lsh.n_rounds
    rounds = tuple(bucket_deaths(k_bucket[..., r], valid, end, time, per_round) for r in range(lsh.n_rounds))
    return KeySets(time, death, rounds, q_bucket, k_bucket)


def _remember(
    patterns: tuple[Pattern, ...],
    time: Timeline,
    k: Tensor,
    v: Tensor,
    memory_position: Tensor,
    score: Tensor | None,
    bucket: Tensor | None,
    sets: KeySets,
) -> Memory:
    batch, heads = k.shape[:2]
    alive = sets.survivors().view(batch, heads, -1)
    position = torch.cat([memory_position, time.position_BL[:, None].expand(-1, heads, -1)], 2)
    slots = memory_slots(patterns)
    if slots is None:  # Full: as many as the longest segment still open; without resets nothing was forgotten
        slots = int(alive.sum(2).max()) if time.resets else alive.shape[2]
    if time.resets or time.n_memory or slots != alive.shape[2]:
        order = alive.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :slots]
        alive, position = alive.gather(2, order), position.gather(2, order)
        k, v = _gather(k, order), _gather(v, order)
        score = None if score is None else score.gather(2, order)
        bucket = None if bucket is None else _gather(bucket, order)
        if missing := slots - order.shape[2]:
            alive, position = F.pad(alive, (0, missing)), F.pad(position, (0, missing))
            k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
            score = None if score is None else F.pad(score, (0, missing))
            bucket = None if bucket is None else F.pad(bucket, (0, 0, 0, missing))
    empty = ~alive
    return Memory(
        k=k.masked_fill(empty[..., None], 0),
        v=v.masked_fill(empty[..., None], 0),
        position=position.masked_fill(empty, -1),
        score=k.new_zeros(batch, heads, 0) if score is None else score.masked_fill(empty, 0),
        bucket=position.new_zeros(batch, heads, slots, 0)
        if bucket is None
        else bucket.masked_fill(empty[..., None], 0),
        next_position=time.position_BL[:, -1] + 1,
    )


def _gather(x_BHSN: Tensor, order_BHM: Tensor) -> Tensor:
    return x_BHSN.gather(2, order_BHM[..., None].expand(-1, -1, -1, x_BHSN.shape[-1]))


def sparse_attention_reference(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    *,
    reset: Tensor | None = None,
    score_BLH: Tensor | None = None,
    buckets: Buckets | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definitions, written out: returns y (B, L, H, P) and the key sets (B, H, L, L) bool. O(L^3): for
    tests only.
    """
    sets = key_sets_reference(q_BLHN, patterns, reset=reset, score_BLH=score_BLH, buckets=buckets)
    scale = 1 / math.sqrt(q_BLHN.shape[-1]) if scale is None else scale
    logits = torch.einsum("blhn,bshn->bhls", q_BLHN, k_BLHN) * scale
    logits = logits.masked_fill(~sets, -torch.inf)
    weights = torch.exp(logits - logits.detach().amax(-1, keepdim=True).clamp(min=-1e9))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhls,bshp->blhp", weights, v_BLHP), sets


def key_sets_reference(
    like_BLHN: Tensor,
    patterns: tuple[Pattern, ...],
    *,
    reset: Tensor | None = None,
    score_BLH: Tensor | None = None,
    buckets: Buckets | None = None,
) -> Tensor:
    """A_i of every query as (B, H, L, L) bool, by counting better keys among those seen."""
    batch, length, heads = like_BLHN.shape[:3]
    at = torch.arange(length, device=like_BLHN.device)
    if reset is None:
        reset = torch.zeros(batch, length, dtype=torch.bool, device=like_BLHN.device)
    segment = reset.cumsum(1)
    seen = (segment[:, :, None] == segment[:, None, :]) & (at[:, None] >= at)  # (B, query, key)
    place = seen.sum(2) - 1  # in-segment position of every key
    seen, place = seen[:, None].expand(-1, heads, -1, -1), place[:, None].expand(-1, heads, -1)
    later = (at[:, None] > at).expand(batch, heads, -1, -1)  # [better, key]

    def top(eligible: Tensor, better: Tensor, n_keys: int) -> Tensor:
        n_better = torch.einsum("bhij,bhjk->bhik", eligible.double(), better.double())
        return eligible & (n_better < n_keys)

    admitted = torch.zeros_like(seen)
    for pattern in patterns:
        if isinstance(pattern, Full):
            admitted = admitted | seen
        elif isinstance(pattern, Window):
            admitted = admitted | top(seen, later, pattern.n_keys)
        elif isinstance(pattern, Sink):
            admitted = admitted | (seen & (place < pattern.n_keys)[:, :, None])
        elif isinstance(pattern, Dilated):
            grid = (place % pattern.stride == pattern.stride - 1)[:, :, None]
            admitted = admitted | top(seen & grid, later, pattern.n_keys)
        elif isinstance(pattern, KeySelection):
            assert score_BLH is not None
            score = score_BLH.transpose(1, 2)
            higher = score[..., :, None] > score[..., None, :]
            tied = score[..., :, None] == score[..., None, :]
            admitted = admitted | top(seen, higher | (tied & later), pattern.n_keys)
        elif isinstance(pattern, Lsh):
            assert buckets is not None
            for r in range(pattern.n_rounds):
                q_code, k_code = buckets.q[..., r].transpose(1, 2), buckets.k[..., r].transpose(1, 2)
                match = seen & (q_code[..., :, None] == k_code[..., None, :])
                admitted = admitted | top(match, later, pattern.n_keys // pattern.n_rounds)
    return admitted
