"""Causal sparse attention over a union of patterns, with a bounded memory between calls.

    y_i = sum_{j in A_i} softmax_j(q_i . k_j * scale) v_j          A_i: the union of the patterns' key sets

A query with no admissible key outputs zero. A reset empties every pattern's memory before its position. ``forward``
over a whole sequence and one call per position give the same result: what later queries may need is handed over in a
``Memory`` of as many slots as the patterns declare.

Executions of the same sets (``dispatch.explain_sparse_attention`` picks one), for a budget of K keys:

* *reference*: the definitions written out as L x L masks; only for tests, no memory.
* *decode*: a single query and its own slots. Time O(K), whatever came before.
* *streaming*: a compiled loop over time on a CPU that gathers each query's keys. Time O(L K), memory O(L).
* *tiled*: matrix products on any device. Time O(L (K + CHUNK) + S log S), memory O(L (K + CHUNK)).
* *triton*: the same tiles in a GPU's kernels, which gather keys themselves. Time as tiled, memory O(L).
* *dense*: lifetimes (see ``lifetimes``) compared into one L x S mask; for short sequences without a compiler.
* *sdpa*: ``Full`` without memory and resets is PyTorch's own causal attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.ops import dispatch, tiled_attention
from recollect.ops.attend import attend, merge
from recollect.ops.attention_memory import Buckets, Memory, decisive, init_memory, memory_bytes, slot_regions
from recollect.ops.decode_attention import decode
from recollect.ops.key_sets import KeySets, key_sets, slot_table
from recollect.ops.lifetimes import Timeline, timeline
from recollect.ops.patterns import (
    Dilated,
    Full,
    KeySelection,
    Lsh,
    Pattern,
    Sink,
    Window,
    find,
    memory_slots,
)
from recollect.ops.scan import accumulator_dtype
from recollect.ops.streaming_attention import stream

__all__ = [
    "Buckets",
    "Memory",
    "init_memory",
    "key_sets_reference",
    "memory_bytes",
    "sparse_attention",
    "sparse_attention_reference",
]


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
    ``scale`` defaults to N^-1/2. ``path`` is "auto", "decode" (a single position), "streaming", "triton", "tiled",
    "dense" or "sdpa". Gradients reach q, k, v and the memory's k and v; choosing the sets is not differentiable.
    """
    scale = 1 / math.sqrt(q_BLHN.shape[-1]) if scale is None else scale
    patterns = decisive(patterns)
    dtype = accumulator_dtype(torch.promote_types(q_BLHN.dtype, v_BLHP.dtype))
    if path == "auto":
        path = dispatch.explain_sparse_attention(
            q_BLHN.shape[1],
            0 if memory is None else memory.position.shape[2],
            patterns,
            q_BLHN.device,
            dtype,
            fresh=memory is None and reset is None,
            width=max(q_BLHN.shape[3], v_BLHP.shape[3]),
        ).path
    # Sums of exponentials need float32 even where autocast would take half precision.
    with torch.autocast(q_BLHN.device.type, enabled=False):
        if path == "decode":
            if memory is None:
                sizes = (q_BLHN.shape[0], q_BLHN.shape[2], q_BLHN.shape[3], v_BLHP.shape[3])
                memory = init_memory(patterns, *sizes, device=q_BLHN.device, dtype=k_BLHN.dtype)
            return decode(q_BLHN, k_BLHN, v_BLHP, patterns, memory, reset, score_BLH, buckets, scale)
        if path == "streaming":
            return _stream(q_BLHN, k_BLHN, v_BLHP, patterns, memory, reset, score_BLH, buckets, scale)
        in_sets = _in_sets_outside_graphs if path == "triton" else _in_sets
        return in_sets(q_BLHN, k_BLHN, v_BLHP, patterns, memory, reset, score_BLH, buckets, scale, path)


def _in_sets(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory | None,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
    scale: float,
    path: str,
) -> tuple[Tensor, Memory]:
    """The executions that work out the sets of the whole sequence first."""
    batch, length, heads, _ = q_BLHN.shape
    q, k, v = (t.transpose(1, 2) for t in (q_BLHN, k_BLHN, v_BLHP))
    score = None if score_BLH is None else score_BLH.detach().transpose(1, 2)
    if memory is not None:
        k, v = torch.cat([memory.k, k], 2), torch.cat([memory.v, v], 2)
    n_memory = k.shape[2] - length
    time = timeline(length, n_memory, _start(memory, q), reset)
    sets = key_sets(patterns, time, memory, q, score, buckets)
    if path == "triton":
        kernels = dispatch.gpu_kernels("sparse_attention", *(x.new_empty(0) for x in (q, k, v)))
        assert kernels is not None, "path triton needs Triton, and a GPU or its interpreter"
        y = kernels.attend(q_BLHN, k.transpose(1, 2), v.transpose(1, 2), sets, patterns, scale).transpose(1, 2)
    elif path == "sdpa":
        q_rows, k_rows, v_rows = (_rows(x).unflatten(0, (batch, heads)) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, is_causal=True, scale=scale)
    else:
        rows = (_rows(q), _rows(k), _rows(v))
        if path == "dense":
            partial = attend(*rows, sets.admits(), scale)
        elif find(patterns, Full):
            partial = tiled_attention.full(*rows, sets, scale)
        else:
            parts = tiled_attention.passes(*rows, sets, patterns, scale)  # pyright: ignore[reportCallIssue] its decorator
            partial = merge(parts)
        y = partial.normalised().view(batch, heads, length, -1)
    y = y.to(v_BLHP.dtype).transpose(1, 2)
    if find(patterns, Full):
        return y, _remember_all(time, k, v, memory, sets)
    slots = memory_slots(patterns)
    assert slots is not None
    codes = None if buckets is None else buckets.k.transpose(1, 2).flatten(0, 1)
    table = slot_table(sets, slots, codes).view(batch, heads, slots)
    k, v = (_gather(x, table.clamp(min=0)).masked_fill((table < 0)[..., None], 0) for x in (k, v))
    return y, _remember(patterns, time, k, v, memory, score, table)


_in_sets_outside_graphs: Callable[..., tuple[Tensor, Memory]] = torch.compiler.disable(_in_sets)  # pyright: ignore[reportAssignmentType] untyped


def _stream(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory | None,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
    scale: float,
) -> tuple[Tensor, Memory]:
    k_dtype, v_dtype = k_BLHN.dtype, v_BLHP.dtype
    if memory is not None:
        k_dtype, v_dtype = torch.promote_types(k_dtype, memory.k.dtype), torch.promote_types(v_dtype, memory.v.dtype)
    dtype = accumulator_dtype(torch.promote_types(torch.promote_types(q_BLHN.dtype, k_dtype), v_dtype))
    kernels = dispatch.kernels("streaming", q_BLHN.new_empty(0, dtype=dtype))
    assert kernels is not None, "path streaming needs numba and a CPU"
    held = None if memory is None else memory._replace(k=memory.k.to(dtype), v=memory.v.to(dtype))
    q, k, v = (x.to(dtype) for x in (q_BLHN, k_BLHN, v_BLHP))
    y, k_kept, v_kept, table = stream(kernels, q, k, v, patterns, held, reset, score_BLH, buckets, scale)
    time = timeline(q.shape[1], 0 if memory is None else memory.position.shape[2], _start(memory, q), reset)
    score = None if score_BLH is None else score_BLH.detach().transpose(1, 2)
    after = _remember(patterns, time, k_kept.to(k_dtype), v_kept.to(v_dtype), memory, score, table)
    return y.to(v_BLHP.dtype), after


def _start(memory: Memory | None, like: Tensor) -> Tensor:
    """Position within the segment of the first new key."""
    if memory is not None:
        return memory.next_position
    return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)


def _rows(x_BHSN: Tensor) -> Tensor:
    return x_BHSN.flatten(0, 1).to(accumulator_dtype(x_BHSN.dtype))


def _gather(x_BHSN: Tensor, order_BHM: Tensor) -> Tensor:
    return x_BHSN.gather(2, order_BHM[..., None].expand(-1, -1, -1, x_BHSN.shape[-1]))


def _remember(
    patterns: tuple[Pattern, ...],
    time: Timeline,
    k: Tensor,
    v: Tensor,
    memory: Memory | None,
    score_BHL: Tensor | None,
    table_BHM: Tensor,
) -> Memory:
    """The memory whose slots hold the sources of ``table_BHM``, -1 for none; ``k`` and ``v`` are theirs already."""
    batch, heads, slots = table_BHM.shape
    position = time.position_BL[:, None].expand(-1, heads, -1)
    if memory is not None:
        position = torch.cat([memory.position, position], 2)
    empty, source = table_BHM < 0, table_BHM.clamp(min=0)
    score = k.new_zeros(batch, heads, 0)
    for region in slot_regions(patterns):
        if isinstance(region.pattern, KeySelection):
            assert score_BHL is not None
            at = slice(region.begin, region.stop)
            score = score_BHL
            if memory is not None:
                score = torch.cat([F.pad(memory.score.detach(), (region.begin, slots - region.stop)), score], 2)
            score = score.gather(2, source[:, :, at]).masked_fill(empty[:, :, at], 0)
    return Memory(
        k=k,
        v=v,
        position=position.gather(2, source).masked_fill(empty, -1),
        score=score,
        next_position=time.position_BL[:, -1] + 1,
    )


def _remember_all(time: Timeline, k: Tensor, v: Tensor, memory: Memory | None, sets: KeySets) -> Memory:
    """The memory under ``Full``: as long as the longest segment still open; without resets nothing is forgotten."""
    batch, heads = k.shape[:2]
    position = time.position_BL[:, None].expand(-1, heads, -1)
    if memory is not None:
        position = torch.cat([memory.position, position], 2)
    alive = (sets.death_RS >= time.length).view(batch, heads, -1)
    if time.resets or time.n_memory:
        slots = int(alive.sum(2).max()) if time.resets else alive.shape[2]
        order = alive.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :slots]
        alive, position, k, v = alive.gather(2, order), position.gather(2, order), _gather(k, order), _gather(v, order)
    empty = ~alive
    return Memory(
        k=k.masked_fill(empty[..., None], 0),
        v=v.masked_fill(empty[..., None], 0),
        position=position.masked_fill(empty, -1),
        score=k.new_zeros(batch, heads, 0),
        next_position=time.position_BL[:, -1] + 1,
    )


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
