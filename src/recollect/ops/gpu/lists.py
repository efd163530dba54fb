"""Which keys from before a chunk of queries some query of it may use, as lists of fixed width.

Two launches, no host sync. Groups of ``GROUP`` positions first: one program per group reads the lifetimes of everything
before it and packs what reaches into the group, in order of the sources. Then one program per chunk packs from its
group's list and from the keys of the group before the chunk. Places are prefix sums of the flags, so the order is that
of the sources whatever the schedule.

Floor: 16 bytes of lifetimes per source and 4 per place of the table. The kernels read 8 bytes of deaths per source and
group (they stay in the L2 cache), that is 8 S^2 / (2 GROUP) a row, and GROUP / 2 + slots lifetimes per chunk.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 2048
"""Positions per group, at least one chunk."""
TILE = 4096
"""Sources that a program of the first launch looks at in one step."""


def alive_at_chunk_starts(
    birth_RS: Tensor, death_RS: Tensor, n_memory: int, length: int, chunk: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Sources from before each chunk whose lifetime meets it, (R, chunks, slots), and how many, (R, chunks), in int32.

    ``birth_RS``, ``death_RS`` (R, S) int64: source s may be used by queries ``birth <= i < death``. The first
    ``n_memory`` sources are before every chunk whatever their birth; source ``n_memory + j`` is of position j. Chunks
    are ``chunk`` positions, the last may be shorter. Lists ascend and are filled up with -1. ``slots`` is the most that
    a list can hold, and the most remembered sources that have a lifetime; what would not fit is left out.
    """
    rows, sources = death_RS.shape
    chunks = triton.cdiv(length, chunk)
    per_group = max(1, GROUP // chunk)
    groups = triton.cdiv(chunks, per_group)
    birth_RS, death_RS = birth_RS.contiguous(), death_RS.contiguous()
    # A group may meet more remembered sources than any of its chunks.
    reach = slots + min(slots, n_memory)
    group_list = torch.empty(rows, groups, reach, dtype=torch.int32, device=death_RS.device)
    group_count = torch.empty(rows, groups, dtype=torch.int32, device=death_RS.device)
    table = torch.empty(rows, chunks, slots, dtype=torch.int32, device=death_RS.device)
    count = torch.empty(rows, chunks, dtype=torch.int32, device=death_RS.device)
    size = per_group * chunk
    tile = min(TILE, max(16, triton.next_power_of_2(sources)))
    _alive_in_groups[rows, groups](
        birth_RS, death_RS, group_list, group_count, sources, n_memory, size, reach, tile, num_warps=8
    )
    width = max(16, triton.next_power_of_2(reach))
    tile = min(1024, max(16, triton.next_power_of_2(size)))
    _alive_in_chunks[rows, chunks](
        birth_RS,
        death_RS,
        group_list,
        group_count,
        table,
        count,
        sources,
        n_memory,
        chunk,
        per_group,
        groups,
        slots,
        reach,
        tile,
        width,
        num_warps=4,
    )
    return table, count


@triton.jit
def _alive_in_groups(birth, death, table, count, sources, n_memory, size, slots, TILE: tl.constexpr):
    """The sources from before every group that reach into it."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = group * size
    at = tl.arange(0, TILE)
    base = row * sources
    here = (row * tl.num_programs(1) + group) * slots
    placed = tl.zeros((), tl.int32)
    for first in range(0, n_memory + begin, TILE):
        source = first + at
        inside = source < tl.minimum(n_memory + begin, sources)
        ends = tl.load(death + base + source, mask=inside, other=-1)
        held = inside & (source < n_memory)
        born = tl.load(birth + base + source, mask=held, other=0)
        alive = (ends > begin) & ((source >= n_memory) | ((born < ends) & (born < begin + size)))
        place = placed + tl.cumsum(alive.to(tl.int32), 0) - 1
        tl.store(table + here + place, source, mask=alive & (place < slots))
        placed += tl.sum(alive.to(tl.int32), 0)
    tl.store(count + row * tl.num_programs(1) + group, tl.minimum(placed, slots))


@triton.jit
def _alive_in_chunks(
    birth,
    death,
    group_table,
    group_count,
    table,
    count,
    sources,
    n_memory,
    chunk,
    per_group,
    groups,
    slots,
    reach,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sources of the group's list, then the group's own earlier keys, that reach into a chunk."""
    row, this = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = this // per_group
    begin = this * chunk
    base = row * sources
    here = (row * tl.num_programs(1) + this) * slots

    nth = tl.arange(0, WIDTH)
    listed = nth < tl.load(group_count + row * groups + group)
    known = tl.load(group_table + (row * groups + group) * reach + nth, mask=listed, other=0)
    known_end = tl.load(death + base + known, mask=listed, other=-1)
    born = tl.load(birth + base + known, mask=listed & (known < n_memory), other=0)
    lives = (known_end > begin) & ((known >= n_memory) | ((born < known_end) & (born < begin + chunk)))
    spot = tl.cumsum(lives.to(tl.int32), 0) - 1
    tl.store(table + here + spot, known, mask=lives & (spot < slots))
    placed = tl.sum(lives.to(tl.int32), 0)

    at = tl.arange(0, TILE)
    for first in range(n_memory + group * per_group * chunk, n_memory + begin, TILE):
        source = first + at
        ends = tl.load(death + base + source, mask=source < n_memory + begin, other=-1)
        alive = ends > begin
        place = placed + tl.cumsum(alive.to(tl.int32), 0) - 1
        tl.store(table + here + place, source, mask=alive & (place < slots))
        placed += tl.sum(alive.to(tl.int32), 0)
    placed = tl.minimum(placed, slots)
    tl.store(table + here + nth, nth * 0 - 1, mask=(nth >= placed) & (nth < slots))
    tl.store(count + row * tl.num_programs(1) + this, placed)
