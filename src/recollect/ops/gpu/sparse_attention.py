"""Sparse attention over one call's key sets by Triton: passes over disjoint keys in a row, and their gradients.

Slots first, then one hash round after another; each goes on from the y and lse that the one before left, in float32
until the last writes y in the values' dtype. Nothing waits for the device: beside what sorts and lists the keys,
forward is 1 + 2 n_rounds launches, backward 2 + 3 n_rounds, two fills and the casts of dk and dv.

For backward q, k, v, y, lse (4 B per query and head) and the index arrays are kept, nothing of size length x budget.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops.gpu import bucket_attention, slot_attention
from recollect.ops.gpu.bucket_attention import Hashed
from recollect.ops.gpu.bucketing import key_tiles, query_tiles, sort_by_bucket
from recollect.ops.gpu.lists import alive_at_chunk_starts
from recollect.ops.gpu.slot_attention import Listed
from recollect.ops.gpu.softmax import deltas, tiling
from recollect.ops.key_sets import KeySets
from recollect.ops.lifetimes import CHUNK
from recollect.ops.patterns import Lsh, Pattern, find, memory_slots
from recollect.ops.tiled_attention import tile_size


class Passes(NamedTuple):
    """The keys of one call, pass by pass."""

    slots: Listed | None
    rounds: tuple[Hashed, ...]


def attend(
    q_BLHN: Tensor, k_BSHN: Tensor, v_BSHP: Tensor, sets: KeySets, patterns: tuple[Pattern, ...], scale: float
) -> Tensor:
    """y (B, L, H, P) in the dtype of v, zero where no key is admitted. Heads of at most 256, patterns without ``Full``.
    Any strides are taken; features are best contiguous.
    """
    dtype = torch.promote_types(torch.promote_types(q_BLHN.dtype, k_BSHN.dtype), v_BSHP.dtype)
    q, k, v = (_by_feature(x.to(dtype)) for x in (q_BLHN, k_BSHN, v_BSHP))
    most = tiling(q, v, backward=True).queries
    y: Tensor = _Attend.apply(q, k, v, passes(sets, patterns, most), scale)  # pyright: ignore[reportAssignmentType]
    return y.to(v_BSHP.dtype)


def passes(sets: KeySets, patterns: tuple[Pattern, ...], most: int) -> Passes:
    """What the kernels read of the key sets; hashed queries and keys are taken at most ``most`` at a time."""
    n_memory, length = sets.time.n_memory, sets.time.length
    listed = None
    slots = memory_slots(tuple(p for p in patterns if not isinstance(p, Lsh)))
    if slots:
        lived = (sets.birth_RS.contiguous(), sets.death_RS.contiguous())
        listed = Listed(*alive_at_chunk_starts(*lived, n_memory, length, CHUNK, slots), *lived, CHUNK)
    lsh = find(patterns, Lsh)
    if lsh is None:
        return Passes(listed, ())
    q_code = _stacked([each.q_code_RL for each in sets.rounds])
    code = _stacked([each.code_RS for each in sets.rounds])
    death = _stacked([each.death_RS for each in sets.rounds])
    tile = min(most, tile_size(length, lsh.n_bits))
    rounds: list[Hashed] = []
    for r, each in enumerate(sets.rounds):
        q = sort_by_bucket(each.q_code_RL, lsh.n_buckets, tile)
        k = sort_by_bucket(each.code_RS, lsh.n_buckets, tile, (each.death_RS > 0) & each.own_RS)
        upto = (q_code[: r + 1], code[: r + 1], death[: r + 1])
        rounds.append(Hashed(q, k, lsh.n_keys // lsh.n_rounds, sets.until_RS.contiguous(), *upto))
    return Passes(listed, tuple(rounds))


def _stacked(rounds: list[Tensor]) -> Tensor:
    return torch.stack(rounds) if len(rounds) > 1 else rounds[0].contiguous()[None]


def _by_feature(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attend(torch.autograd.Function):
    """The equations of ``softmax``, with delta and the lse of all passes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Passes, scale: float) -> Tensor:
        batch, length, heads, _ = q.shape
        y = torch.empty(batch, length, heads, v.shape[-1], dtype=v.dtype, device=v.device)
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=v.device)
        n_passes = (keys.slots is not None) + len(keys.rounds)
        interim = y if n_passes == 1 else torch.empty_like(y, dtype=torch.float32)
        before = None
        if keys.slots is not None:
            before = y if n_passes == 1 else interim
            slot_attention.forward(q, k, v, keys.slots, scale, before, lse)
        n_memory = k.shape[1] - length
        q_tiles = [query_tiles(each.q, each.k, n_memory, each.n_keys) for each in keys.rounds]
        for r, (each, tiles) in enumerate(zip(keys.rounds, q_tiles, strict=True)):
            out = y if r + 1 == len(keys.rounds) else interim
            bucket_attention.forward(q, k, v, each, tiles, scale, before, out, lse)
            before = out
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.keys, ctx.q_tiles, ctx.scale = keys, q_tiles, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        keys, scale = ctx.keys, ctx.scale
        dy = dy.contiguous()
        delta = deltas(y, dy)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Every key's gradient is a sum over programs, in float32; the last to add to dq writes it in its dtype.
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        n_passes = (keys.slots is not None) + len(keys.rounds)
        interim = dq if n_passes == 1 else torch.empty_like(dq, dtype=torch.float32)
        before = None
        for r, (each, q_tiles) in enumerate(zip(keys.rounds, ctx.q_tiles, strict=True)):
            out = dq if r + 1 == n_passes else interim
            k_tiles = key_tiles(each.q, each.k, k.shape[1] - q.shape[1], each.n_keys)
            bucket_attention.backward(q, k, v, each, q_tiles, k_tiles, scale, dy, lse, delta, before, out, dk, dv)
            before = out
        if keys.slots is not None:
            slot_attention.backward(q, k, v, keys.slots, scale, dy, lse, delta, before, dq, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
