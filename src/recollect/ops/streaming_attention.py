"""Sparse attention as a compiled loop over time: ``kernels.streaming`` with its gradients.

Time O(L K (N + P)) and memory O(L (N + P)) for budget K. Nothing but the inputs is kept for backward, which goes
through time forward once more.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recollect.ops.attention_memory import Buckets, Memory, hash_regions, slot_regions
from recollect.ops.patterns import Dilated, KeySelection, Lsh, Pattern, Sink, Window, find, key_budget, memory_slots

LANES = 16
"""Rows are padded to a multiple of this, as ``kernels.vectors`` wants them."""
LISTED = 8192
"""Indices of keys that are listed at a time: enough queries to forget the cost of a call, few enough for a cache."""
MAX_ROUNDS = 32
"""Hash rounds that the flags of a key have room for."""


class _Plan(NamedTuple):
    """The arguments of the kernel that decide on sets of keys."""

    chunk: int
    budget: int
    patterns: Tensor
    ring: Tensor
    next_position: Tensor
    reset: Tensor
    position: Tensor
    key_of: Tensor
    score: Tensor
    q_bucket: Tensor
    k_bucket: Tensor


def streams(patterns: tuple[Pattern, ...]) -> bool:
    """Whether the kernel knows all of these patterns."""
    lsh = find(patterns, Lsh)
    known = all(isinstance(p, Window | Sink | Dilated | KeySelection | Lsh) for p in patterns)
    return known and (lsh is None or lsh.n_rounds <= MAX_ROUNDS)


def stream(
    kernels: ModuleType,
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory | None,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the keys and values of the outgoing memory, and the source of its every slot, (B, H, M)
    int64: a slot of the memory that came in, or M + t for position t, -1 for an empty slot. Without an incoming memory
    sources are positions.
    """
    plan = _plan(q_BLHN, patterns, memory, reset, score_BLH, buckets)
    none = [x.new_empty(x.shape[0], x.shape[2], 0, x.shape[3]) for x in (k_BLHN, v_BLHP)]
    held = none if memory is None else (memory.k, memory.v)
    slots = memory_slots(patterns)
    assert slots is not None
    return _Stream.apply(q_BLHN, k_BLHN, v_BLHP, *held, kernels, plan, slots, scale)  # pyright: ignore[reportReturnType]


class _Stream(torch.autograd.Function):
    """dk_j += s_ij q_i, dq_i += s_ij k_j, dv_j += w_ij dy_i with s_ij = w_ij (dy_i . v_j - sum_s w_is dy_i . v_s)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_held: Tensor,
        v_held: Tensor,
        kernels: ModuleType,
        plan: _Plan,
        slots: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, length, heads, _ = q.shape
        y = q.new_empty(batch, length, heads, v.shape[-1])
        table = torch.empty(batch * heads, slots, dtype=torch.int64)
        rows = [_pack(held, new) for held, new in ((k_held, k), (v_held, v))]
        none = q.new_empty(0, 0, 0, 0), q.new_empty(0, 0)
        kernels.attend(False, scale, (q, *rows, y, none[0], none[0], none[1], none[1]), *plan, table)
        kept = [_taken(x, table, new) for x, new in zip(rows, (k, v), strict=True)]
        ctx.save_for_backward(q, k, v, k_held, v_held, table, *plan[2:])
        ctx.kernels, ctx.sizes, ctx.scale = kernels, plan[:2], scale
        table = table.view(batch, heads, slots)
        ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return y, kept[0], kept[1], table

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, k_held, v_held, table, *plan = ctx.saved_tensors
        dy = grad_outputs[0]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        rows = [_pack(held, new) for held, new in ((k_held, k), (v_held, v))]
        d_rows = [torch.zeros_like(x) for x in rows]
        for d_row, kept in zip(d_rows, grad_outputs[1:3], strict=True):
            if kept is not None:
                _give(d_row, table, kept)
        if dy is None:
            dq.zero_()
        else:
            ctx.kernels.attend(True, ctx.scale, (q, *rows, dy, dy, dq, *d_rows), *ctx.sizes, *plan, table)
        new: list[Tensor] = []
        old: list[Tensor] = []
        for d_row, like, held in zip(d_rows, (k, v), (k_held, v_held), strict=True):
            both = d_row.view(*held.shape[:2], held.shape[2] + like.shape[1], -1)[..., : like.shape[-1]]
            new.append(both[:, :, held.shape[2] :].transpose(1, 2))
            old.append(both[:, :, : held.shape[2]])
        return dq, *new, *old, None, None, None, None


def _pack(held_BHMN: Tensor, new_BLHN: Tensor) -> Tensor:
    """All sources of a row in one flat table whose rows are padded to whole vectors: (R, S * padded)."""
    both = new_BLHN.transpose(1, 2)
    if held_BHMN.shape[2]:
        both = torch.cat([held_BHMN, both], 2)
    spare = -both.shape[-1] % LANES
    return (F.pad(both, (0, spare)) if spare else both).flatten(2).flatten(0, 1).contiguous()


def _taken(rows: Tensor, table_RM: Tensor, like_BLHN: Tensor) -> Tensor:
    """The rows that the outgoing slots hold, (B, H, M, N); zeros in empty slots."""
    batch, _, heads, width = like_BLHN.shape
    flat, source, there = _filled(rows, table_RM, width)
    taken = rows.new_zeros(table_RM.numel(), width)
    taken[there.flatten()] = flat.index_select(0, source)[:, :width]
    return taken.view(batch, heads, -1, width)


def _give(d_rows: Tensor, table_RM: Tensor, d_kept_BHMN: Tensor) -> None:
    """Add the gradients of the outgoing slots to those of their sources."""
    width = d_kept_BHMN.shape[-1]
    flat, source, there = _filled(d_rows, table_RM, width)
    flat[:, :width].index_add_(0, source, d_kept_BHMN.flatten(0, 1)[there])


def _filled(rows: Tensor, table_RM: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A packed table as (R * S, padded), which of its rows are held, and whether each outgoing slot holds one."""
    flat = rows.view(-1, -(-width // LANES) * LANES)
    first = torch.arange(table_RM.shape[0])[:, None] * (flat.shape[0] // table_RM.shape[0])
    there = table_RM >= 0
    return flat, (table_RM + first)[there], there


def _plan(
    q_BLHN: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory | None,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
) -> _Plan:
    batch, length, heads, _ = q_BLHN.shape
    rows = batch * heads
    codes: dict[type[Pattern], int] = {Window: 0, Sink: 1, Dilated: 2, KeySelection: 3}
    regions = slot_regions(patterns)
    table = [[codes[type(r.pattern)], r.stop - r.begin, getattr(r.pattern, "stride", 1), r.begin] for r in regions]
    rings = hash_regions(patterns)
    lsh = find(patterns, Lsh)
    ring = [lsh.n_keys // lsh.n_rounds, 1 << lsh.n_bits, lsh.n_rounds] if lsh else [1, 1, 0]
    slots = regions[-1].stop if regions else 0
    n_held = 0 if memory is None else memory.position.shape[2]
    position = torch.empty(rows, 0, dtype=torch.int64) if memory is None else memory.position.flatten(0, 1)
    score = q_BLHN.new_empty(rows, 0)
    if score_BLH is not None and find(patterns, KeySelection):
        score = score_BLH.detach().transpose(1, 2).flatten(0, 1)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        if memory is not None:
            (chosen,) = (r for r in regions if isinstance(r.pattern, KeySelection))
            held = memory.score.detach().flatten(0, 1)
            score = torch.cat([F.pad(held, (chosen.begin, n_held - chosen.stop)), score], 1)
    if lsh is None:
        q_bucket = k_bucket = torch.empty(batch, 0, heads, 0, dtype=torch.int64)
    else:
        assert buckets is not None, "Lsh needs the buckets of queries and keys"
        q_bucket, k_bucket = buckets
    budget = key_budget(patterns)
    assert budget is not None
    return _Plan(
        chunk=max(1, min(length, 64, LISTED // budget)),
        budget=budget,
        patterns=torch.tensor(table, dtype=torch.int64).view(-1, 4),
        ring=torch.tensor([*ring, slots]),
        next_position=torch.zeros(batch, dtype=torch.int64) if memory is None else memory.next_position,
        reset=torch.empty(batch, 0, dtype=torch.bool) if reset is None else reset,
        position=position,
        key_of=_same_keys(position, len(regions) + len(rings)),
        score=score,
        q_bucket=q_bucket,
        k_bucket=k_bucket,
    )


def _same_keys(position_RM: Tensor, n_regions: int) -> Tensor:
    """One of the slots that hold the same key, the same for all of them, (R, M) int32."""
    at = torch.arange(position_RM.shape[1], dtype=torch.int32).expand(position_RM.shape)
    if n_regions == 1 or not position_RM.shape[1]:
        return at
    position, order = position_RM.sort(dim=1, stable=True)
    again = (position[:, 1:] == position[:, :-1]) & (position[:, 1:] >= 0)
    first = F.pad(torch.where(again, 0, at[:, 1:]), (1, 0)).cummax(1).values
    return torch.empty_like(at, memory_format=torch.contiguous_format).scatter_(
        1, order, order.gather(1, first.long()).to(torch.int32)
    )
