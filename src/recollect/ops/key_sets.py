"""The key sets of one call as intervals over its sources, and what is left of them as the next memory.

Sources are the M slots of the incoming memory, then the L new keys. A key that several regions hold is several sources,
and a query uses the first region's: the interval of a copy begins where the last one of earlier regions ends.

Everything here is integer bookkeeping without gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.attention_memory import Buckets, Memory, Region, hash_regions, slot_regions
from recollect.ops.lifetimes import Timeline, bucket_deaths, slot_deaths
from recollect.ops.patterns import Full, KeySelection, Lsh, Pattern, find


class Round(NamedTuple):
    """One hash round. A copy of a key knows its key's bucket and death even if another region holds it."""

    q_code_RL: Tensor
    code_RS: Tensor
    death_RS: Tensor  # 0 unless the round's rings hold the key
    own_RS: Tensor  # whether this source is the one that the round uses


class KeySets(NamedTuple):
    """The admitted (query, source) pairs. Rows R = B x H; see ``lifetimes``."""

    time: Timeline
    birth_RS: Tensor  # first query that slots admit a source to
    death_RS: Tensor  # and the first after the last
    until_RS: Tensor  # death of the key in slots, whichever copy
    rounds: tuple[Round, ...]
    left: tuple[tuple[Region, Tensor], ...]  # what each region holds in the end, of its own slots and the new keys

    def admits(self) -> Tensor:
        """The whole mask, (R, L, S): for short sequences and tests."""
        query = torch.arange(self.time.length, device=self.death_RS.device)[:, None]
        mask = (self.birth_RS[:, None] <= query) & (query < self.death_RS[:, None])
        if self.rounds:
            free = (self.time.arrival_S <= query) & (query >= self.until_RS[:, None])
            for each in self.rounds:
                held = (each.q_code_RL[:, :, None] == each.code_RS[:, None]) & (query < each.death_RS[:, None])
                mask = mask | (held & free & each.own_RS[:, None])
                free = free & ~held
        return mask


def key_sets(
    patterns: tuple[Pattern, ...],
    time: Timeline,
    memory: Memory | None,
    like_BHSN: Tensor,
    score_BHL: Tensor | None,
    buckets: Buckets | None,
) -> KeySets:
    """The sets of one call. ``like_BHSN``: any tensor with batch and heads in front."""
    batch, heads = like_BHSN.shape[:2]
    n_memory, rows = time.n_memory, batch * heads
    device = like_BHSN.device
    position = torch.empty(batch, heads, 0, dtype=torch.int64, device=device) if memory is None else memory.position
    if find(patterns, Full):
        death = slot_deaths(patterns[0], time, position, None).flatten(0, 1)
        birth = time.arrival_S.expand_as(death)
        return KeySets(time, birth, death, death, (), ())
    same = _same_keys(position.flatten(0, 1))
    births, deaths, left = [torch.zeros_like(same)], [torch.zeros_like(same)], []
    until = torch.zeros_like(same)  # by key
    new_death = torch.zeros(rows, time.length, dtype=torch.int64, device=device)
    for region in slot_regions(patterns):
        at = slice(region.begin, region.stop)
        score = score_BHL
        if score_BHL is not None and isinstance(region.pattern, KeySelection) and memory is not None:
            score = torch.cat([memory.score.detach(), score_BHL], 2)
        death = slot_deaths(region.pattern, time, position[:, :, at], score).flatten(0, 1)
        held = death.shape[1] - time.length
        keys = same[:, at]
        before = until.gather(1, keys)
        births[0][:, at] = before
        deaths[0][:, at] = death[:, :held]
        until.scatter_(1, keys, torch.maximum(before, death[:, :held]))
        new_death = torch.maximum(new_death, death[:, held:])
        left.append((region, death >= time.length))
    births.append(time.arrival_S[n_memory:].expand_as(new_death))
    deaths.append(new_death)
    rounds: list[Round] = []
    for region in hash_regions(patterns):
        assert buckets is not None, "Lsh needs the buckets of queries and keys"
        one, alive = _round(region, time, position, same, buckets)
        rounds.append(one)
        left.append((region, alive))
    return KeySets(
        time,
        torch.cat(births, 1),
        torch.cat(deaths, 1),
        torch.cat([until.gather(1, same), new_death], 1),
        tuple(rounds),
        tuple(left),
    )


def _same_keys(position_RM: Tensor) -> Tensor:
    """A number of its own for every key that the slots hold, equal in slots that hold the same one, (R, M)."""
    if not position_RM.shape[1]:
        return position_RM
    position, order = position_RM.sort(dim=1, stable=True)
    other = (position[:, 1:] != position[:, :-1]) | (position[:, 1:] < 0)
    number = torch.nn.functional.pad(other, (1, 0)).cumsum(1)
    return torch.empty_like(number).scatter_(1, order, number)


def _round(
    region: Region, time: Timeline, position_BHM: Tensor, same_RM: Tensor, buckets: Buckets
) -> tuple[Round, Tensor]:
    lsh = region.pattern
    assert isinstance(lsh, Lsh)
    q_code, k_code = (x[..., region.hash_round].transpose(1, 2).flatten(0, 1) for x in buckets)
    rows, device = k_code.shape[0], k_code.device
    n_keys = lsh.n_keys // lsh.n_rounds
    position = position_BHM[:, :, region.begin : region.stop].flatten(0, 1)
    held = position.shape[1]
    time = time.holding(held)
    code = torch.cat([(torch.arange(held, device=device) // n_keys).expand(rows, -1), k_code], 1)
    valid = torch.cat([position >= 0, torch.ones_like(k_code, dtype=torch.bool)], 1)
    end = time.end_BS.repeat_interleave(rows // time.end_BS.shape[0], 0)
    death = bucket_deaths(code, valid, end, time, n_keys, lsh.n_buckets)
    alive = death >= time.length
    if same_RM.shape[1] > held:
        by_key = torch.zeros_like(same_RM)
        keys = same_RM[:, region.begin : region.stop]
        code_M = by_key.scatter(1, keys, code[:, :held]).gather(1, same_RM)
        death_M = by_key.scatter(1, keys, death[:, :held]).gather(1, same_RM)
        code, death = torch.cat([code_M, k_code], 1), torch.cat([death_M, death[:, held:]], 1)
    own = torch.ones_like(death, dtype=torch.bool)
    if same_RM.shape[1]:
        own[:, : region.begin] = False
        own[:, region.stop : same_RM.shape[1]] = False
    return Round(q_code, code, death, own), alive


def slot_table(sets: KeySets, slots: int, codes_RLK: Tensor | None) -> Tensor:
    """The source that every slot of the outgoing memory holds, (R, slots) int64, -1 where it is empty.

    ``codes_RLK`` are the buckets of the new keys. Cost O(S log S).
    """
    n_memory, length = sets.time.n_memory, sets.time.length
    rows, device = sets.death_RS.shape[0], sets.death_RS.device
    table = torch.full((rows, slots + 1), -1, device=device)  # the last column is for keys without a slot
    new = n_memory + torch.arange(length, device=device)
    for region, alive in sets.left:
        held = alive.shape[1] - length
        source = torch.cat([region.begin + torch.arange(held, device=device), new]).expand(rows, -1)
        if isinstance(region.pattern, Lsh):
            assert codes_RLK is not None
            n_keys = region.pattern.n_keys // region.pattern.n_rounds
            n_buckets = 1 << region.pattern.n_bits
            code = (torch.arange(held, device=device) // n_keys).expand(rows, -1)
            code = torch.cat([code, codes_RLK[..., region.hash_round]], 1)
            code, order = torch.where(alive, code, n_buckets).sort(dim=1, stable=True)
            at = torch.arange(code.shape[1], device=device)
            first = torch.nn.functional.pad(torch.where(code[:, 1:] != code[:, :-1], at[1:], 0), (1, 0))
            rank = at - first.cummax(1).values
            slot = torch.where(code < n_buckets, region.begin + code * n_keys + rank, slots)
            table.scatter_(1, slot, source.gather(1, order))
        else:
            rank = alive.cumsum(1) - 1
            table.scatter_(1, torch.where(alive, region.begin + rank, slots), source)
    return table[:, :slots]
