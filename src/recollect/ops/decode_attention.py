"""One position of sparse attention: the query's own slots and nothing else.

Cost O(K (N + P)) for a budget of K keys, plus one copy of the memory, because the contract is pure. Nothing depends on
how many positions came before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.attend import attend
from recollect.ops.attention_memory import Buckets, Memory, hash_regions, slot_regions
from recollect.ops.patterns import Dilated, KeySelection, Lsh, Pattern, Sink, Window
from recollect.ops.scan import accumulator_dtype


class _Change(NamedTuple):
    """Slots that a position may change, (R, n), and the slot each is to take over; M for the new key."""

    slots: Tensor
    source: Tensor


def decode(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    patterns: tuple[Pattern, ...],
    memory: Memory,
    reset: Tensor | None,
    score_BLH: Tensor | None,
    buckets: Buckets | None,
    scale: float,
) -> tuple[Tensor, Memory]:
    """``sparse_attention`` for L = 1 after a memory, without ``Full``: y (B, 1, H, P) and the next memory.

    On a GPU ``gpu.decode``, one kernel, unless a gradient is wanted.
    """
    floats = (q_BLHN, k_BLHN, v_BLHP, memory.k, memory.v, memory.score)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in floats)):
        kernels = dispatch.gpu_kernels("decode", *floats)
        if kernels is not None:
            return kernels.decode(q_BLHN, k_BLHN, v_BLHP, patterns, memory, reset, score_BLH, buckets, scale)
    batch, _, heads, _ = q_BLHN.shape
    rows, n_memory = batch * heads, memory.position.shape[2]
    fresh = None if reset is None else reset[:, 0]
    if fresh is not None:
        row = fresh[:, None, None]
        memory = Memory(
            torch.where(row[..., None], 0, memory.k),
            torch.where(row[..., None], 0, memory.v),
            torch.where(row, -1, memory.position),
            torch.where(row, 0, memory.score),
            torch.where(fresh, 0, memory.next_position),
        )
    position, score = memory.position.flatten(0, 1), memory.score.detach().flatten(0, 1)
    new_score = None if score_BLH is None else score_BLH.detach()[:, 0].flatten()[:, None]
    place = memory.next_position.repeat_interleave(heads)[:, None]
    changes: list[_Change] = []
    asked: list[Tensor] = []
    new_scores = score
    for region in slot_regions(patterns):
        held = position[:, region.begin : region.stop]
        slots = torch.arange(region.begin, region.stop, device=position.device).expand(rows, -1)
        out, takes = _admission(region.pattern, held, place, score, new_score)
        take = _shift(held, out, takes)
        if isinstance(region.pattern, KeySelection):
            assert new_score is not None
            new_scores = torch.cat([score, new_score.to(torch.promote_types(score.dtype, new_score.dtype))], 1)
            new_scores = new_scores.gather(1, take)
        changes.append(_Change(slots, torch.where(take < held.shape[1], take + region.begin, n_memory)))
        asked.append(slots)
    for region in hash_regions(patterns):
        assert isinstance(region.pattern, Lsh)
        assert buckets is not None, "Lsh needs the buckets of queries and keys"
        n_keys = region.pattern.n_keys // region.pattern.n_rounds
        q_ring, k_ring = (
            region.begin
            + x[:, 0, :, region.hash_round].flatten()[:, None] * n_keys
            + torch.arange(n_keys, device=position.device)
            for x in buckets
        )
        held = position.gather(1, k_ring)
        take = _shift(held, torch.zeros_like(place), torch.ones_like(place, dtype=torch.bool))
        source = k_ring.gather(1, take.clamp(max=n_keys - 1))
        changes.append(_Change(k_ring, torch.where(take < n_keys, source, n_memory)))
        asked.append(q_ring)
    slots = torch.cat([change.slots for change in changes], 1)
    source = torch.cat([change.source for change in changes], 1)
    is_new = source == n_memory
    moved = torch.where(is_new, place, position.gather(1, source.clamp(max=n_memory - 1)))
    position = position.scatter(1, slots, moved)
    row = torch.arange(rows, device=position.device)[:, None] * n_memory
    into, taken = (row + slots).flatten(), (row + source.clamp(max=n_memory - 1)).flatten()
    kept: list[Tensor] = []
    for old, new in ((memory.k, k_BLHN), (memory.v, v_BLHP)):
        dtype = torch.promote_types(old.dtype, new.dtype)
        if old.requires_grad:  # empty slots are constants
            old = old.masked_fill((memory.position < 0)[..., None], 0)
        flat, width = old.to(dtype).reshape(rows * n_memory, -1), old.shape[-1]
        came = new[:, 0].to(dtype).reshape(rows, 1, width).expand(-1, slots.shape[1], -1)
        values = torch.where(is_new[..., None], came, flat.index_select(0, taken).view_as(came))
        kept.append(flat.index_copy(0, into, values.flatten(0, 1)).view(batch, heads, n_memory, width))
    after = Memory(
        kept[0],
        kept[1],
        position.view(batch, heads, -1),
        new_scores.view(batch, heads, -1),
        memory.next_position + 1,
    )
    # Of a key's copies the first region's counts: a stable sort by position puts it in front of the others.
    mine = torch.cat(asked, 1)
    mine_position, order = position.gather(1, mine).sort(dim=1, stable=True)
    mine = mine.gather(1, order)
    again = torch.nn.functional.pad(mine_position[:, 1:] == mine_position[:, :-1], (1, 0))
    admitted = (mine_position >= 0) & ~again
    with torch.autocast(q_BLHN.device.type, enabled=False):
        picked = [
            x.flatten(0, 2).index_select(0, (row + mine).flatten()).view(rows, mine.shape[1], -1) for x in after[:2]
        ]
        k, v = (x.to(accumulator_dtype(x.dtype)) for x in picked)
        q = q_BLHN.transpose(1, 2).flatten(0, 1)
        y = attend(q.to(k.dtype), k, v, admitted[:, None], scale).normalised()
    return y.to(v_BLHP.dtype).view(batch, heads, 1, -1).transpose(1, 2), after


def _admission(
    pattern: Pattern, held: Tensor, place: Tensor, score: Tensor, new_score: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The slot (R, 1) that a full region gives up, and whether (R, 1) the pattern takes the new key."""
    oldest = torch.zeros_like(place)
    full = held[:, -1:] >= 0
    if isinstance(pattern, Window):
        return oldest, torch.ones_like(full)
    if isinstance(pattern, Sink):
        return oldest, ~full
    if isinstance(pattern, Dilated):
        return oldest, place % pattern.stride == pattern.stride - 1
    if isinstance(pattern, KeySelection):
        assert new_score is not None, "KeySelection needs a score for every key"
        lowest = score.amin(1, keepdim=True)
        at = torch.arange(held.shape[1], device=held.device)
        first = torch.where(score == lowest, at, held.shape[1] - 1).amin(1, keepdim=True)
        return first, ~full | (new_score >= lowest)
    raise TypeError(f"pattern {pattern.kind} goes by hash buckets")


def _shift(held: Tensor, out: Tensor, takes: Tensor) -> Tensor:
    """Which slot every slot takes over, n for the new key, when slot ``out`` of a full region leaves and the new key
    comes last; a region that is not full has it in its first empty slot.
    """
    n = held.shape[1]
    at = torch.arange(n, device=held.device)
    count = (held >= 0).sum(1, keepdim=True)
    last = count.clamp(max=n - 1)
    out = torch.where(count < n, last, out)
    take = torch.where((at >= out) & (at < last), at + 1, at)
    return torch.where(takes, torch.where(at == last, n, take), at)
