"""The GPU's integer bookkeeping of sparse attention against the plain definitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from recollect.ops import dispatch, hashing, lifetimes
from recollect.ops.attention_memory import Buckets, init_memory
from recollect.ops.gpu import bucketing, lists, topk
from recollect.ops.key_sets import key_sets
from recollect.ops.lifetimes import Timeline, timeline
from recollect.ops.patterns import HashRule, KeySelection, Lsh, Window

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are made on a GPU where there is one; ops take PyTorch's operations unless told otherwise."""
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    with torch.device("cuda") if torch.cuda.is_available() else nullcontext():
        yield


def call(
    length: int, n_memory: int, resets: bool, rows: int = 2
) -> tuple[Timeline, Tensor, Tensor, dict[str, Tensor | None]]:
    """A call of ``length`` queries after memory slots of which some are empty, with resets at both ends too."""
    reset = torch.rand(rows, length) < 0.05
    reset[0, 0] = reset[1, -1] = True
    time = timeline(length, n_memory, torch.zeros(rows, dtype=torch.int64), reset if resets else None)
    valid = torch.ones(rows, n_memory + length, dtype=torch.bool)
    valid[:, :n_memory] = torch.rand(rows, n_memory) < 0.7
    return time, valid, time.end_BS, {"reset": reset}


@pytest.mark.parametrize(
    ("length", "n_memory", "n_keys", "resets", "tied"),
    [
        (1, 0, 3, False, False),
        (1, 5, 3, True, True),
        (63, 0, 1, True, True),
        (65, 40, 33, True, False),
        (130, 3, 5, False, True),
    ],
)
def test_topk_deaths(
    length: int, n_memory: int, n_keys: int, resets: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "BLOCK", 32)
    monkeypatch.setattr(topk, "SEARCHED", 64)
    time, valid, end, _ = call(length, n_memory, resets)
    score = torch.randn(valid.shape)
    if tied:  # with both zeros among them
        score = score.bfloat16().round() * torch.where(torch.rand(valid.shape) < 0.5, -1.0, 1.0)
    expected = lifetimes.topk_deaths(score, valid, end, time, n_keys)
    monkeypatch.setattr(dispatch, "KERNELS", "triton")
    assert torch.equal(lifetimes.topk_deaths(score, valid, end, time, n_keys), expected)


def alive_plainly(birth: Tensor, death: Tensor, n_memory: int, length: int, chunk: int) -> list[list[list[int]]]:
    def listed(r: int, s: int, begin: int) -> bool:
        before = s < n_memory or s - n_memory < begin
        return before and max(int(birth[r, s]), begin) < min(int(death[r, s]), begin + chunk)

    rows, sources = birth.shape
    return [
        [[s for s in range(sources) if listed(r, s, begin)] for begin in range(0, length, chunk)] for r in range(rows)
    ]


@pytest.mark.parametrize(("length", "n_memory", "spare"), [(1, 0, 1), (1, 3, 0), (65, 0, 2), (130, 70, 0)])
def test_alive_at_chunk_starts(length: int, n_memory: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "GROUP", 32)
    monkeypatch.setattr(lists, "TILE", 64)
    rows = 3
    birth = torch.cat([torch.randint(0, length + 1, (rows, n_memory)), torch.arange(length).expand(rows, -1)], 1)
    death = (birth + torch.randint(-1, 40, birth.shape)).clamp(max=length)
    expected = alive_plainly(birth, death, n_memory, length, 16)
    most = max(len(each) for row in expected for each in row)
    slots = max(most, int((birth < death)[:, :n_memory].sum(1).max())) + spare
    table, count = lists.alive_at_chunk_starts(birth, death, n_memory, length, 16, slots)
    assert count.tolist() == [[len(each) for each in row] for row in expected]
    assert table.tolist() == [[each + [-1] * (slots - len(each)) for each in row] for row in expected]


def test_a_group_may_meet_more_sources_than_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "GROUP", 32)
    birth = torch.cat([torch.full((3,), 48), torch.arange(64)])[None]
    death = birth.clone()
    death[0, :3] = 60  # remembered, they take over in chunk 3, and
    death[0, 3:6] = 40  # the first new keys die in chunk 2, of the same group
    table, _ = lists.alive_at_chunk_starts(birth, death, 3, 64, 16, 3)
    assert table.tolist() == [[[-1] * 3, [3, 4, 5], [3, 4, 5], [0, 1, 2]]]


def test_lists_never_overflow() -> None:
    birth = torch.arange(40)[None]
    death = torch.full((1, 40), 40)
    table, count = lists.alive_at_chunk_starts(birth, death, 0, 40, 16, 5)
    assert count.tolist() == [[0, 5, 5]]
    assert table.tolist() == [[[-1] * 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]]


@pytest.mark.parametrize("radix", [False, True], ids=["counting", "radix"])
@pytest.mark.parametrize(("size", "n_bits"), [(1, 1), (63, 4), (130, 6)])
def test_sort_by_bucket(size: int, n_bits: int, radix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucketing, "BLOCK", 32)
    monkeypatch.setattr(bucketing, "SORTED", 0 if radix else 1 << 20)
    n_buckets = 1 << n_bits
    code = torch.randint(0, n_buckets, (3, size))
    code[0] = n_buckets - 1
    valid = torch.rand(3, size) < 0.8
    for given in (None, valid):
        key = code if given is None else torch.where(given, code, n_buckets)
        order = key.argsort(dim=1, stable=True)
        counts = torch.nn.functional.one_hot(key, n_buckets + 1).sum(1)[:, :n_buckets]
        actual = bucketing.sort_by_bucket(code, n_buckets, 4, given)
        assert torch.equal(actual.order.long(), order)
        assert torch.equal(actual.start[:, 1:].long(), counts.cumsum(1))
        assert torch.equal(actual.first_tile[:, 1:].long(), (-(-counts // 4)).cumsum(1))
        assert not actual.start[:, 0].any()
        assert not actual.first_tile[:, 0].any()


@pytest.mark.parametrize(("length", "n_memory", "n_bits", "n_keys"), [(1, 0, 1, 2), (65, 20, 2, 5), (80, 0, 4, 3)])
def test_tiles_meet_their_keys(length: int, n_memory: int, n_bits: int, n_keys: int) -> None:
    rows, tile, n_buckets = 2, 4, 1 << n_bits
    q_code = torch.randint(0, n_buckets, (rows, length))
    k_code = torch.randint(0, n_buckets, (rows, n_memory + length))
    valid = torch.rand(k_code.shape) < 0.9
    queries = bucketing.sort_by_bucket(q_code, n_buckets, tile)
    keys = bucketing.sort_by_bucket(k_code, n_buckets, tile, valid)
    meets = torch.zeros(rows, length, n_memory + length, dtype=torch.bool)  # by place
    low, high = bucketing.key_ranges(queries, keys, n_memory, n_keys)
    for r in range(rows):
        for place, i in enumerate(queries.order[r].tolist()):
            at = [p for p, s in enumerate(keys.order[r].tolist()) if valid[r, s] and k_code[r, s] == q_code[r, i]]
            seen = [p for p in at if int(keys.order[r, p]) - n_memory <= i][-n_keys:]
            assert list(range(int(low[r, place]), int(high[r, place]))) == seen
            meets[r, place, seen] = True
    for of_keys, tiles in (
        (False, bucketing.query_tiles(queries, keys, n_memory, n_keys)),
        (True, bucketing.key_tiles(queries, keys, n_memory, n_keys)),
    ):
        side, code = (keys, k_code) if of_keys else (queries, q_code)
        assert tiles.first.shape == (rows, bucketing.n_tiles(code.shape[1], n_buckets, tile))
        for r in range(rows):
            covered: list[int] = []
            for bucket, first, filled, begin, end in zip(*(t[r].tolist() for t in tiles), strict=True):
                places = list(range(first, first + filled))
                covered += places
                assert {int(code[r, side.order[r, p]]) for p in places} <= {bucket}
                mine = meets[r, :, places].any(1) if of_keys else meets[r, places].any(0)
                met = mine.nonzero().flatten().tolist()
                assert not met or (begin, end) == (met[0], met[-1] + 1)
                assert met or end <= begin
            assert covered == list(range(int(side.start[r, -1])))


@pytest.mark.parametrize(("length", "n_memory", "resets"), [(1, 0, False), (65, 24, True), (130, 0, True)])
def test_bucket_deaths(length: int, n_memory: int, resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    time, valid, end, _ = call(length, n_memory, resets)
    code = torch.randint(0, 8, valid.shape)
    expected = lifetimes.bucket_deaths(code, valid, end, time, 3, 8)
    monkeypatch.setattr(dispatch, "KERNELS", "triton")
    monkeypatch.setattr(bucketing, "BLOCK", 32)
    assert torch.equal(lifetimes.bucket_deaths(code, valid, end, time, 3, 8), expected)


@pytest.mark.parametrize("rule", ["sign", "argmax"])
@pytest.mark.parametrize("n_planes", [1, 5, 16])
def test_read_buckets(rule: HashRule, n_planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        code = torch.randn(2, 65, 3, 2, n_planes).mul(2).round().to(dtype).transpose(0, 1)  # with zeros and equals
        expected = hashing.read_buckets(code, rule)
        monkeypatch.setattr(dispatch, "KERNELS", "triton")
        assert torch.equal(hashing.read_buckets(code, rule), expected)
        monkeypatch.setattr(dispatch, "KERNELS", "torch")


@pytest.mark.parametrize("held", [False, True], ids=["fresh", "held"])
def test_key_sets_are_those_of_the_plain_operations(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = (Window(3), KeySelection(4), Lsh(4, n_bits=2, n_rounds=2))
    batch, heads, length = 2, 2, 40
    memory = None
    if held:
        memory = init_memory(patterns, batch, heads, 4, 4)
        position = memory.position.clone()
        position[..., :3], position[..., 3:6], position[..., 7:9] = torch.tensor([7, 8, 9]), torch.tensor([2, 5, 9]), 8
        memory = memory._replace(position=position, next_position=torch.full((batch,), 10))
    n_memory = 0 if memory is None else memory.position.shape[2]
    reset = torch.zeros(batch, length, dtype=torch.bool)
    reset[0, 17] = reset[1, 30] = True
    time = timeline(length, n_memory, torch.full((batch,), 10 if held else 0), reset)
    buckets = Buckets(*torch.randint(0, 4, (2, batch, length, heads, 2)).unbind(0))
    given = (patterns, time, memory, torch.zeros(batch, heads, 1, 4), torch.randn(batch, heads, length), buckets)
    expected = key_sets(*given)
    monkeypatch.setattr(dispatch, "KERNELS", "triton")
    actual = key_sets(*given)
    assert torch.equal(actual.admits(), expected.admits())
    for mine, theirs in zip(actual.left, expected.left, strict=True):
        assert torch.equal(mine[1], theirs[1])
