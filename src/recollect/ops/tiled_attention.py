"""Sparse attention by matrix products of tiles, never an L x L array.

*Slots.* A chunk of C queries sees the keys alive when the chunk begins, at most the patterns' slots, plus its own C
keys: one dense product with a mask of lifetimes. This serves window, sink, dilated and key selection together.

*Buckets.* Queries and keys are laid out by (hash bucket, time) in tiles of C that start at their bucket's first
element. A query's keys are a contiguous range of its bucket whose ends never move back as queries advance, so a tile
of queries meets a short run of key tiles; over a bucket the runs sum to at most n_queries/C + n_keys/C + (K/C + 1)
n_queries/C tile pairs. Tiles hold what came before at the same places whatever comes after, so causality is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recollect.ops.attend import Partial, attend, lowest
from recollect.ops.lifetimes import CHUNK
from recollect.ops.patterns import Lsh, Pattern, find, memory_slots

if TYPE_CHECKING:
    from recollect.ops.key_sets import KeySets


@torch.compiler.disable  # how many tiles meet follows from the data
def passes(
    q_RLN: Tensor, k_RSN: Tensor, v_RSP: Tensor, sets: KeySets, patterns: tuple[Pattern, ...], scale: float
) -> list[Partial]:
    """One partial result for all slot patterns together and one per hash round, over disjoint key sets."""
    parts: list[Partial] = []
    slots = memory_slots(tuple(p for p in patterns if not isinstance(p, Lsh)))
    if slots:
        parts.append(slot_pass(q_RLN, k_RSN, v_RSP, sets, slots, scale))
    lsh = find(patterns, Lsh)
    if lsh is not None:
        per_round = lsh.n_keys // lsh.n_rounds
        parts += [bucket_pass(q_RLN, k_RSN, v_RSP, sets, r, per_round, lsh.n_bits, scale) for r in range(lsh.n_rounds)]
    return parts


def full(q_RLN: Tensor, k_RSN: Tensor, v_RSP: Tensor, sets: KeySets, scale: float) -> Partial:
    """Dense causal attention in blocks of queries, recomputed in backward: O(L S) time, O(R CHUNK S) memory."""
    time = sets.time

    def block(q: Tensor, k: Tensor, v: Tensor, begin: int) -> Partial:
        query = torch.arange(begin, begin + q.shape[1], device=q.device)[:, None]
        sources = k.shape[1]
        mask = (time.arrival_S[:sources] <= query) & (query < sets.death_RS[:, None, :sources])
        return attend(q, k, v, mask, scale)

    blocks = []
    for begin in range(0, time.length, CHUNK):
        sources = time.n_memory + min(begin + CHUNK, time.length)
        parts = (q_RLN[:, begin : begin + CHUNK], k_RSN[:, :sources], v_RSP[:, :sources], begin)
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_RLN, k_RSN, v_RSP))
        blocks.append(checkpoint(block, *parts, use_reentrant=False) if grad else block(*parts))
    return Partial(*(torch.cat(field, 1) for field in zip(*blocks, strict=True)))


def slot_pass(q_RLN: Tensor, k_RSN: Tensor, v_RSP: Tensor, sets: KeySets, slots: int, scale: float) -> Partial:
    """All patterns that ignore buckets. ``slots``: most sources alive at any time, copies of a key counted apart."""
    time = sets.time
    rows, length, d_key = q_RLN.shape
    sources, d_value = v_RSP.shape[1:]
    chunks = -(-length // CHUNK)
    device = q_RLN.device
    alive = _alive_at_chunk_starts(sets, chunks, slots)
    own = time.n_memory + torch.arange(chunks * CHUNK, device=device).view(1, chunks, CHUNK)
    own = torch.where(own < sources, own, -1).expand(rows, -1, -1)
    source = torch.cat([alive, own], 2)  # (R, chunks, slots + C), -1 where there is none
    flat = (source.clamp(min=0) + sources * torch.arange(rows, device=device)[:, None, None]).flatten()
    query = torch.arange(chunks * CHUNK, device=device).view(1, chunks, CHUNK, 1)
    death = torch.where(source >= 0, sets.death_RS.flatten()[flat].view_as(source), 0)
    birth = sets.birth_RS.flatten()[flat].view_as(source)
    mask = (birth[:, :, None] <= query) & (query < death[:, :, None])
    q = torch.nn.functional.pad(q_RLN, (0, 0, 0, chunks * CHUNK - length)).reshape(-1, CHUNK, d_key)
    k = k_RSN.reshape(-1, d_key).index_select(0, flat).view(rows * chunks, -1, d_key)
    v = v_RSP.reshape(-1, d_value).index_select(0, flat).view(rows * chunks, -1, d_value)
    partial = attend(q, k, v, mask.flatten(0, 1), scale)
    return Partial(*(t.view(rows, chunks * CHUNK, -1)[:, :length] for t in partial))


def _alive_at_chunk_starts(sets: KeySets, chunks: int, slots: int) -> Tensor:
    """Sources from before each chunk that some query of it may use, (R, chunks, slots), padded with -1."""
    death_RS, n_memory = sets.death_RS, sets.time.n_memory
    rows, sources = death_RS.shape
    # A remembered copy may take over from another one in the middle of a chunk.
    first = torch.cat([sets.birth_RS[:, :n_memory], sets.birth_RS[:, n_memory:] + CHUNK], 1) // CHUNK
    last = (death_RS - 1).div(CHUNK, rounding_mode="floor")
    count = (last - first + 1).clamp(min=0).flatten()
    source = torch.repeat_interleave(torch.arange(rows * sources, device=death_RS.device), count)
    before = count.cumsum(0) - count
    nth = torch.arange(len(source), device=source.device) - before[source]
    row, column = source // sources, source % sources
    group = row * chunks + first.flatten()[source] + nth
    order = group.argsort(stable=True)
    group, column = group[order], column[order]
    place = torch.arange(len(group), device=group.device) - _group_starts(group, rows * chunks)[group]
    table = torch.full((rows * chunks, slots), -1, device=death_RS.device)
    table[group, place] = column
    return table.view(rows, chunks, slots)


def _group_starts(sorted_group: Tensor, n_groups: int) -> Tensor:
    counts = torch.bincount(sorted_group, minlength=n_groups)
    return counts.cumsum(0) - counts


def bucket_pass(
    q_RLN: Tensor,
    k_RSN: Tensor,
    v_RSP: Tensor,
    sets: KeySets,
    r: int,
    n_keys: int,
    n_bits: int,
    scale: float,
) -> Partial:
    """Hash round ``r``: keys of the query's bucket, less those that slots or earlier rounds already gave it."""
    time, mine = sets.time, sets.rounds[r]
    rows, length, d_key = q_RLN.shape
    sources, d_value = v_RSP.shape[1:]
    tile = tile_size(length, n_bits)
    groups = rows << n_bits
    row = torch.arange(rows, device=q_RLN.device)[:, None] << n_bits
    q_group = (row + mine.q_code_RL).flatten()
    k_group = torch.where((mine.death_RS > 0) & mine.own_RS, row + mine.code_RS, groups).flatten()
    q_tiles, q_order = _tiles(q_group, groups, tile)
    k_tiles, k_order = _tiles(k_group, groups, tile)

    # How many keys of its bucket each query has seen, in the sorted order of queries, hence its range [low, high).
    when_k = (time.arrival_S + 1).repeat(rows)[k_order] + k_group[k_order] * (length + 2)
    when_q = (torch.arange(length, device=row.device) + 1).repeat(rows)[q_order] + q_group[q_order] * (length + 2)
    high = torch.searchsorted(when_k, when_q, right=True) - k_tiles.first[q_group[q_order]]
    slot = torch.empty_like(q_order)
    slot[q_order] = q_tiles.slot  # where each query sits: tile * C + offset
    per_tile = torch.full((q_tiles.n_tiles * tile,), -1, device=row.device)
    per_tile[q_tiles.slot] = high
    per_tile = per_tile.view(-1, tile)
    low_tile = (per_tile[:, 0] - n_keys).clamp(min=0) // tile
    high_tile = -(-per_tile.amax(1) // tile)
    run = (high_tile - low_tile).clamp(min=0)
    pair_q = torch.repeat_interleave(torch.arange(q_tiles.n_tiles, device=row.device), run)
    nth = torch.arange(len(pair_q), device=row.device) - (run.cumsum(0) - run)[pair_q]
    pair_k = (k_tiles.first_tile[q_tiles.group] + low_tile)[pair_q] + nth

    q_index, k_index = q_tiles.table(q_order, tile), k_tiles.table(k_order, tile)  # (tiles, C) into R*L and R*S
    query = torch.where(q_index >= 0, q_index % length, -2)[pair_q][:, :, None]
    flat = k_index.clamp(min=0)
    death = torch.where(k_index >= 0, mine.death_RS.flatten()[flat], 0)[pair_k][:, None]
    arrived = time.arrival_S[flat % sources][pair_k][:, None] <= query
    mask = arrived & (query < death) & ~(query < sets.until_RS.flatten()[flat][pair_k][:, None])
    for earlier in sets.rounds[:r]:
        code_q = earlier.q_code_RL.flatten()[q_index.clamp(min=0)][pair_q][:, :, None]
        code_k = earlier.code_RS.flatten()[flat][pair_k][:, None]
        mask &= ~((code_q == code_k) & (query < earlier.death_RS.flatten()[flat][pair_k][:, None]))

    q = (q_RLN.reshape(-1, d_key) * scale).index_select(0, q_index.clamp(min=0).flatten()).view(-1, tile, d_key)
    k = k_RSN.reshape(-1, d_key).index_select(0, flat.flatten()).view(-1, tile, d_key)
    v = v_RSP.reshape(-1, d_value).index_select(0, flat.flatten()).view(-1, tile, d_value)
    logits = torch.bmm(q.index_select(0, pair_q), k.index_select(0, pair_k).transpose(1, 2))
    logits = logits.masked_fill(~mask, lowest(q.dtype))
    peak = logits.detach().amax(-1)
    maximum = torch.full((q_tiles.n_tiles, tile), lowest(q.dtype), dtype=q.dtype, device=q.device)
    maximum = maximum.scatter_reduce(0, pair_q[:, None].expand(-1, tile), peak, "amax")
    weights = torch.exp(logits - maximum[pair_q][:, :, None]).masked_fill(~mask, 0)
    total = q.new_zeros(q_tiles.n_tiles, tile, d_value).index_add(
        0, pair_q, torch.bmm(weights, v.index_select(0, pair_k))
    )
    weight = q.new_zeros(q_tiles.n_tiles, tile).index_add(0, pair_q, weights.sum(-1))
    fields = (total.view(-1, d_value), weight.view(-1, 1), maximum.view(-1, 1))
    return Partial(*(t.index_select(0, slot).view(rows, length, -1) for t in fields))


def tile_size(length: int, n_bits: int) -> int:
    """Tiles about as long as an average bucket, within 16..64; a function of sizes alone, never of the data."""
    average = max(1, length >> n_bits)
    return min(64, max(16, 1 << (average - 1).bit_length()))


class _Tiles(NamedTuple):
    """Elements sorted by (group, time), cut into tiles of C that start at their group's first element."""

    first: Tensor  # (groups,) sorted index of each group's first element
    first_tile: Tensor  # (groups,)
    group: Tensor  # (tiles,)
    slot: Tensor  # (elements,) tile * C + offset of each element, in sorted order
    n_tiles: int

    def table(self, order: Tensor, tile: int) -> Tensor:
        """Original index of every place of every tile, (tiles, C), -1 where a tile is not full."""
        index = torch.full((self.n_tiles * tile,), -1, device=order.device)
        index[self.slot] = order
        return index.view(-1, tile)


def _tiles(group: Tensor, n_groups: int, tile: int) -> tuple[_Tiles, Tensor]:
    """Tiles and the sorted order of all elements whose group is below ``n_groups``."""
    counts = torch.bincount(group, minlength=n_groups)[:n_groups]
    order = group.argsort(stable=True)[: int(counts.sum())]
    tiles = -(-counts // tile)
    first, first_tile = counts.cumsum(0) - counts, tiles.cumsum(0) - tiles
    in_order = group[order]
    slot = first_tile[in_order] * tile + torch.arange(len(order), device=group.device) - first[in_order]
    return _Tiles(
        first=first,
        first_tile=first_tile,
        group=torch.repeat_interleave(torch.arange(n_groups, device=group.device), tiles),
        slot=slot,
        n_tiles=int(tiles.sum()),
    ), order
