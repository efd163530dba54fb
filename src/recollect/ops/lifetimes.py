"""When each key may be attended to: every sparse pattern as one interval of queries per key.

The sources of a pattern are S = M + L keys: M in the region that it was left by an earlier call (arrival -1) and the L
new ones (arrival j). It admits key s for queries i with ``arrival_s <= i < death_s`` (and equal hash buckets for
``Lsh``). All intervals of a key begin at its arrival, so a union of patterns reaches to the latest death. A reset ends
every lifetime; a death that has not come by the end of the call is written as L.

Everything here is integer bookkeeping without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.patterns import Dilated, Full, KeySelection, Pattern, Sink, Window

CHUNK = 64


@dataclass(frozen=True)
class Timeline:
    """Where the sources and queries of one call stand in time."""

    n_memory: int
    length: int
    start_B: Tensor
    """In-segment position of the first new key if no reset precedes it."""
    arrival_S: Tensor
    """Query index at which a source appears: -1 for remembered ones."""
    position_BL: Tensor
    """Position of each new key within its own segment."""
    end_BS: Tensor
    """First query of the next segment for each source, L where none begins."""
    resets: bool
    """Whether resets were given at all, true or not."""
    first_reset_B: Tensor
    """The first reset of the call, L without one: the end of every remembered key."""

    def holding(self, n_memory: int) -> Timeline:
        """The same call after ``n_memory`` remembered keys instead."""
        first = self.n_memory
        arrival = torch.cat([self.arrival_S.new_full((n_memory,), -1), self.arrival_S[first:]])
        end = torch.cat([self.first_reset_B[:, None].expand(-1, n_memory), self.end_BS[:, first:]], 1)
        return replace(self, n_memory=n_memory, arrival_S=arrival, end_BS=end)


def timeline(length: int, n_memory: int, start_B: Tensor, reset_BL: Tensor | None) -> Timeline:
    """Lay out one call of ``length`` new positions after ``n_memory`` remembered ones."""
    device = start_B.device
    at = torch.arange(length, device=device)
    arrival = torch.cat([torch.full((n_memory,), -1, device=device), at])
    batch = start_B.shape[0]
    if reset_BL is None:
        position = start_B[:, None] + at
        first_reset = torch.full((batch,), length, device=device)
        end = torch.full((batch, n_memory + length), length, device=device)
    else:
        last_reset = torch.where(reset_BL, at, -1).cummax(1).values
        position = torch.where(last_reset >= 0, at - last_reset, start_B[:, None] + at)
        upcoming = torch.where(reset_BL, at, length).flip(1).cummin(1).values.flip(1)
        after = torch.cat([upcoming[:, 1:], upcoming.new_full((batch, 1), length)], 1)
        first_reset = upcoming[:, 0]
        end = torch.cat([upcoming[:, :1].expand(-1, n_memory), after], 1)
    return Timeline(n_memory, length, start_B, arrival, position, end, reset_BL is not None, first_reset)


def slot_deaths(pattern: Pattern, time: Timeline, held_position_BHM: Tensor, score_BHS: Tensor | None) -> Tensor:
    """Death of every source under one pattern that ignores hash buckets, (B, H, S) int64.

    ``held_position_BHM`` holds in-segment positions of the M keys in the pattern's own region, -1 in empty slots;
    ``score_BHS`` are the priorities for ``KeySelection``. Cost O(S) for the fixed patterns, O(S (n_keys + CHUNK)) for
    key selection.
    """
    time = time.holding(held_position_BHM.shape[2])
    heads = held_position_BHM.shape[1]
    new_position = time.position_BL[:, None].expand(-1, heads, -1)
    position = torch.cat([held_position_BHM, new_position], 2)
    # The query index at which a key had age zero: negative for remembered keys, which a reset would end anyway.
    born = torch.cat(
        [held_position_BHM - time.start_B[:, None, None], time.arrival_S[time.n_memory :].expand_as(new_position)], 2
    )
    end = time.end_BS[:, None].expand_as(position)
    empty = position < 0
    never = torch.zeros_like(position)
    if isinstance(pattern, Full):
        death = end
    elif isinstance(pattern, Window):
        death = torch.minimum(born + pattern.n_keys, end)
    elif isinstance(pattern, Sink):
        death = torch.where(position < pattern.n_keys, end, never)
    elif isinstance(pattern, Dilated):
        on_grid = position % pattern.stride == pattern.stride - 1
        death = torch.where(on_grid, torch.minimum(born + pattern.n_keys * pattern.stride, end), never)
    elif isinstance(pattern, KeySelection):
        assert score_BHS is not None, "KeySelection needs a score for every key"
        death = topk_deaths(score_BHS.flatten(0, 1), ~empty.flatten(0, 1), end.flatten(0, 1), time, pattern.n_keys)
        death = death.view_as(position)
    else:
        raise TypeError(f"pattern {pattern.kind} goes by hash buckets")
    return death.masked_fill(empty, 0)


def bucket_deaths(
    bucket_RS: Tensor, valid_RS: Tensor, end_RS: Tensor, time: Timeline, n_keys: int, n_buckets: int
) -> Tensor:
    """Death of every source when each of ``n_buckets`` keeps its ``n_keys`` most recent keys, (R, S) int64. Cost
    O(S log S); on a GPU ``gpu.bucketing``, O(S).
    """
    module = dispatch.gpu_kernels("bucketing", torch.empty(0, device=bucket_RS.device))
    if module is not None:
        return module.bucket_deaths(bucket_RS, valid_RS, end_RS, time.n_memory, n_keys, n_buckets)
    sources = bucket_RS.shape[1]
    order = torch.where(valid_RS, bucket_RS, -1).argsort(dim=1, stable=True)
    bucket = bucket_RS.gather(1, order)
    death = end_RS.gather(1, order).clone()
    if sources > n_keys:
        evictor_arrival = time.arrival_S[order[:, n_keys:]]
        same = bucket[:, n_keys:] == bucket[:, :-n_keys]
        head = death[:, :-n_keys]
        head.copy_(torch.where(same, torch.minimum(head, evictor_arrival), head))
    scattered = torch.empty_like(death).scatter_(1, order, death)
    return scattered.masked_fill(~valid_RS, 0)


def topk_deaths(score_RS: Tensor, valid_RS: Tensor, end_RS: Tensor, time: Timeline, n_keys: int) -> Tensor:
    """Death of every source when the ``n_keys`` best scores of the prefix are kept, (R, S) int64.

    Streams over chunks of new keys with the survivors so far, so no array exceeds R x CHUNK x (n_keys + CHUNK + M).
    Of equal scores the later key ranks higher. A key that is not among the best on arrival dies as it arrives. On a
    GPU ``gpu.topk``.
    """
    module = dispatch.gpu_kernels("topk", score_RS)
    if module is not None:
        return module.topk_deaths(score_RS, valid_RS, end_RS, time.n_memory, n_keys)
    rows = score_RS.shape[0]
    rank = _ranks(score_RS)
    death = time.arrival_S.clamp(min=0).expand(rows, -1).clone()
    row = torch.arange(rows, device=score_RS.device)[:, None]
    carried = torch.arange(time.n_memory, device=score_RS.device).expand(rows, -1)
    for begin in range(0, time.length, CHUNK):
        stop = min(begin + CHUNK, time.length)
        new = torch.arange(time.n_memory + begin, time.n_memory + stop, device=score_RS.device).expand(rows, -1)
        candidates = torch.cat([carried, new], 1)
        candidates = candidates.gather(1, rank.gather(1, candidates).argsort(1, descending=True))
        query = torch.arange(begin, stop, device=score_RS.device)[None, :, None]
        arrived = time.arrival_S[candidates][:, None] <= query
        present = arrived & (query < end_RS.gather(1, candidates)[:, None]) & valid_RS.gather(1, candidates)[:, None]
        alive = present & (present.cumsum(2, dtype=torch.int32) <= n_keys)
        death[row, candidates] += alive.sum(1)
        # A slot array of fixed width: survivors first, then whatever else, which its death already rules out.
        keep = alive[:, -1].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_keys]
        carried = candidates.gather(1, keep)
        valid_RS = valid_RS.scatter(1, carried, alive[:, -1].gather(1, keep))
    return death


def _ranks(score_RS: Tensor) -> Tensor:
    """A strict order: the rank of every score in its row, ties broken in favour of the later source."""
    order = score_RS.argsort(dim=1, stable=True)
    at = torch.arange(score_RS.shape[1], device=score_RS.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, at)
