"""Lifetimes of the best keys of every prefix: the execution of ``lifetimes.topk_deaths`` on a GPU.

A key dies when the running k-th best value of its segment rises above its own. Values are ranks in the strict order
(segment, score, time), so that keys from before a reset are below every later one and need no special case: the running
k-th best of a whole row never falls, and a key's death is found by binary search in it. Three steps, all integers:

1. the sorted best of every block of ``BLOCK`` keys, blocks side by side;
2. per row the best of all blocks before each: a loop over blocks that merges two sorted lists;
3. from that list, blocks side by side, the k-th best after every key: one warp goes through the keys of a block and
   puts a better key in place of the least of the list.

Floor: a sort of R S keys; then 4 bytes read thrice and 4 written once per key, 16 K / BLOCK bytes per key of lists, and
8 + 8 bytes of ends and deaths. In time the loops count: S / BLOCK merges of log^2 K compare-and-swaps, then BLOCK steps
of one minimum over K.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Keys per block: as many steps of one warp as there are merges per row at 10^6 keys."""
SEARCHED = 1024
"""Keys whose deaths one program looks up."""


def topk_deaths(score_RS: Tensor, valid_RS: Tensor, end_RS: Tensor, n_memory: int, n_keys: int) -> Tensor:
    """``lifetimes.topk_deaths``: (R, S) int64, the first ``n_memory`` sources remembered (arrival -1).

    ``end_RS`` (R, S) int64 is the first query of the next segment of every source, equal within a segment.
    """
    rows, sources = score_RS.shape
    length = sources - n_memory
    value = torch.where(valid_RS, _ranks(score_RS, end_RS), -1)
    width = max(16, triton.next_power_of_2(n_keys))
    block = max(width, min(BLOCK, triton.next_power_of_2(length)))
    memory_blocks = triton.cdiv(n_memory, block)
    blocks = memory_blocks + triton.cdiv(length, block)
    best = value.new_empty(rows, blocks, width)
    before = torch.empty_like(best)
    least = value.new_empty(rows, length)
    death = value.new_empty(rows, sources, dtype=torch.int64)
    _best_of_blocks[rows, blocks](value, best, sources, n_memory, memory_blocks, block, width, num_warps=4)
    _best_before_blocks[rows,](best, before, blocks, width, num_warps=1)
    _least_of_best[rows, blocks - memory_blocks](
        value, before, least, sources, n_memory, memory_blocks, blocks, n_keys, block, width, num_warps=1
    )
    steps = length.bit_length()
    searched = min(SEARCHED, max(16, triton.next_power_of_2(sources)))
    _deaths[rows, triton.cdiv(sources, searched)](
        value, least, end_RS.contiguous(), death, sources, n_memory, length, steps, searched, num_warps=4
    )
    return death


def _ranks(score_RS: Tensor, end_RS: Tensor) -> Tensor:
    """Place of every key in its row's order by (segment, score, time), (R, S) int32: one stable sort."""
    bits = (score_RS.float() + 0.0).view(torch.int32)  # one zero only
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = ((end_RS << 32) + ascending).argsort(dim=1, stable=True)
    at = torch.arange(order.shape[1], device=order.device, dtype=torch.int32).expand_as(order)
    return torch.empty_like(at, memory_format=torch.contiguous_format).scatter_(1, order, at)


@triton.jit
def _best_of_blocks(value, best, sources, n_memory, memory_blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """best (R, blocks, WIDTH): the greatest values of every block, descending, -1 where there are too few.

    Remembered keys fill blocks of their own, before those of new keys.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    remembered = block < memory_blocks
    first = tl.where(remembered, block * BLOCK, n_memory + (block - memory_blocks) * BLOCK)
    stop = tl.where(remembered, n_memory, sources)
    x = tl.load(value + row * sources + first + at, mask=first + at < stop, other=-1)
    x = tl.sort(x, descending=True)
    tl.store(best + (row * tl.num_programs(1) + block) * WIDTH + at, x, mask=at < WIDTH)


@triton.jit
def _best_before_blocks(best, before, blocks, WIDTH: tl.constexpr):
    """before (R, blocks, WIDTH): the greatest values of all earlier blocks, ascending.

    The greater of an ascending and a descending list, place by place, are the greatest of both.
    """
    at = tl.arange(0, WIDTH)
    row = tl.program_id(0).to(tl.int64) * blocks * WIDTH
    here = row + at
    found = tl.load(best + here)
    carried = tl.full((WIDTH,), -1, tl.int32)
    for _ in range(blocks):
        # The next list is on its way while this one is sorted.
        upcoming = tl.load(best + here + WIDTH, mask=here + WIDTH < row + blocks * WIDTH, other=-1)
        tl.store(before + here, carried)
        carried = tl.sort(tl.maximum(carried, found))
        found = upcoming
        here += WIDTH


@triton.jit
def _least_of_best(
    value,
    before,
    least,
    sources,
    n_memory,
    memory_blocks,
    blocks,
    n_keys,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """least (R, L): the ``n_keys``-th greatest value up to and including every new key, -1 while there are fewer."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDTH)
    best = tl.load(before + (row * blocks + memory_blocks + block) * WIDTH + at)
    # Empty places differ from one another, and places beyond n_keys are never the least.
    best = tl.where(best < 0, -1 - at, best)
    best = tl.where(at >= WIDTH - n_keys, best, 0x7FFFFFFF)
    lowest = tl.min(best, 0)
    length = sources - n_memory
    first = block * BLOCK
    value += row * sources + n_memory + first
    least += row * length + first
    x = tl.load(value)
    for i in range(BLOCK):
        upcoming = tl.load(value + i + 1, mask=first + i + 1 < length, other=-1)
        best = tl.where((best == lowest) & (x > lowest) & (x >= 0), x, best)
        lowest = tl.min(best, 0)
        tl.store(least + i, tl.maximum(lowest, -1), mask=first + i < length)
        x = upcoming


@triton.jit
def _deaths(value, least, end, death, sources, n_memory, length, steps, BLOCK: tl.constexpr):
    """The first query whose k-th best is above a key's value, within the key's arrival and its segment's end."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < sources
    here = row * sources + at
    x = tl.load(value + here, mask=inside, other=-1)
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + length
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        lives = tl.load(least + row * length + middle, mask=searching, other=0) <= x
        low = tl.where(searching & lives, middle + 1, low)
        high = tl.where(searching & ~lives, middle, high)
    arrival = tl.maximum(at - n_memory, 0).to(tl.int64)
    last = tl.load(end + here, mask=inside, other=0)
    last = tl.where(x >= 0, tl.minimum(last, low.to(tl.int64)), 0)
    tl.store(death + here, tl.maximum(last, arrival), mask=inside)
