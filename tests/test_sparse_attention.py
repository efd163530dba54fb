"""Sparse attention: every execution against the written-out definitions, values, gradients and key sets."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.ops import dispatch
from recollect.ops.attend import attend, merge
from recollect.ops.hashing import draw_planes, sign_buckets
from recollect.ops.patterns import (
    Dilated,
    Full,
    KeySelection,
    Lsh,
    Pattern,
    Sink,
    Window,
    check_patterns,
    find,
    key_budget,
    memory_slots,
)
from recollect.ops.selection import ranked_positions, selection_loss
from recollect.ops.sparse_attention import (
    Buckets,
    init_memory,
    key_sets_reference,
    memory_bytes,
    sparse_attention,
    sparse_attention_reference,
)

UNIONS: dict[str, tuple[Pattern, ...]] = {
    "full": (Full(),),
    "window": (Window(5),),
    "window-of-one": (Window(1),),
    "sink": (Sink(4),),
    "dilated": (Dilated(3, stride=4),),
    "key-selection": (KeySelection(6),),
    "lsh": (Lsh(4, n_bits=2),),
    "lsh-rounds": (Lsh(6, n_bits=3, n_rounds=2),),
    "fixed": (Window(3), Sink(2), Dilated(3, stride=5)),
    "hax": (Lsh(4, n_bits=2), KeySelection(5)),
    "everything": (Lsh(4, n_bits=2, n_rounds=2), KeySelection(5), Window(3), Sink(1), Dilated(2, stride=7)),
    "full-and-window": (Full(), Window(3)),
}
LENGTHS = (1, 63, 64, 65)
CASES = [
    (name, path)
    for name, union in UNIONS.items()
    for path in ("dense", "tiled", "streaming")
    if path != "streaming" or find(union, Full) is None
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    reset: Tensor
    score: Tensor | None
    buckets: Buckets | None

    def part(self, begin: int, stop: int) -> dict[str, object]:
        at = slice(begin, stop)
        buckets = None if self.buckets is None else Buckets(self.buckets.q[:, at], self.buckets.k[:, at])
        score = None if self.score is None else self.score[:, at]
        return {"reset": self.reset[:, at], "score_BLH": score, "buckets": buckets}


def draw(union: tuple[Pattern, ...], length: int, *, seed: int = 0, d_value: int = 6, batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(batch, length, 2, width, generator=g, dtype=torch.float64).requires_grad_()

    q, k, v = normal(8), normal(8), normal(d_value)
    reset = torch.rand(batch, length, generator=g) < 0.03
    # Rounded, so that scores tie: the tie rule is part of the definition.
    score = torch.randn(batch, length, 2, generator=g, dtype=torch.float64).mul(3).round()
    lsh = find(union, Lsh)
    buckets = None
    if lsh is not None:
        planes = draw_planes(8, 2, lsh.n_rounds, lsh.n_bits, g)
        buckets = Buckets(sign_buckets(q, planes), sign_buckets(k, planes))
    return Inputs(q, k, v, reset, score if find(union, KeySelection) else None, buckets)


def assert_equals_reference(union: tuple[Pattern, ...], x: Inputs, path: str) -> None:
    """Values to 1e-12, gradients of q, k and v to 1e-10."""
    part = x.part(0, x.q.shape[1])
    wanted, _ = sparse_attention_reference(x.q, x.k, x.v, union, **part)
    got, _ = sparse_attention(x.q, x.k, x.v, union, path=path, **part)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(wanted.shape, dtype=wanted.dtype)
    gradients = [torch.autograd.grad((y * weight).sum(), (x.q, x.k, x.v)) for y in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "path"), CASES)
def test_values_and_gradients_equal_the_reference(name: str, length: int, path: str) -> None:
    assert_equals_reference(UNIONS[name], draw(UNIONS[name], length), path)


@pytest.mark.parametrize("setting", ["auto", "torch"])
@pytest.mark.parametrize("length", [128, 1000])
@pytest.mark.parametrize("name", UNIONS)
def test_one_long_row_equals_the_reference(
    name: str, length: int, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of one keeps other strides, and 128 is a whole number of chunks."""
    monkeypatch.setattr(dispatch, "KERNELS", setting)
    monkeypatch.setattr(dispatch, "DENSE_SOURCES", 0)
    assert_equals_reference(UNIONS[name], draw(UNIONS[name], length, batch=1), "auto")


@pytest.mark.parametrize(("name", "path"), CASES)
def test_key_sets_equal_the_reference(name: str, path: str) -> None:
    """Values that are unit vectors reveal which keys got weight, whatever code chose them."""
    length = 130
    union, x = UNIONS[name], draw(UNIONS[name], length, d_value=length, seed=3)
    v = torch.eye(length, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    got, _ = sparse_attention(x.q, x.k, v, union, path=path, **x.part(0, length))
    sets = key_sets_reference(x.q, union, **x.part(0, length))
    assert torch.equal(got.transpose(1, 2) > 0, sets)
    budget = key_budget(union)
    if budget is not None:
        assert int(sets.sum(-1).max()) <= budget


@pytest.mark.parametrize("split", [1, 63, 64, 65, 97])
@pytest.mark.parametrize(("name", "path"), CASES)
def test_memory_carries_everything_that_later_queries_may_need(name: str, split: int, path: str) -> None:
    length = 140
    union, x = UNIONS[name], draw(UNIONS[name], length, seed=5)
    whole, after_whole = sparse_attention(x.q, x.k, x.v, union, path=path, **x.part(0, length))
    memory = init_memory(union, 2, 2, 8, 6, dtype=torch.float64)
    outputs = []
    for begin, stop in ((0, split), (split, length)):
        at = slice(begin, stop)
        y, memory = sparse_attention(
            x.q[:, at], x.k[:, at], x.v[:, at], union, memory=memory, path=path, **x.part(begin, stop)
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    for got, wanted in zip(memory, after_whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    held = sum(leaf.numel() * leaf.element_size() for leaf in memory)
    assert held == memory_bytes(union, 2, 2, 8, 6, 8, int(memory.next_position.max()))


def test_a_query_without_keys_gives_zero_and_passes_no_gradient() -> None:
    union = (Dilated(2, stride=8),)
    x = draw(union, 20)
    x = x._replace(reset=torch.zeros_like(x.reset))
    for path in ("dense", "tiled", "streaming"):
        y, _ = sparse_attention(x.q, x.k, x.v, union, path=path, **x.part(0, 20))
        assert (y[:, :7] == 0).all()
        assert (y[:, 7:] != 0).any()
        grad = torch.autograd.grad(y.sum(), (x.q, x.k, x.v))
        assert all(torch.isfinite(g).all() for g in grad)
        assert (grad[0][:, :7] == 0).all()


def test_duplicates_between_patterns_count_once() -> None:
    """A window inside a wider window changes nothing; in particular no key is weighted twice."""
    x = draw((Window(9), Sink(9)), 50)
    alone, _ = sparse_attention(x.q, x.k, x.v, (Full(),), reset=x.reset, path="tiled")
    for path in ("tiled", "streaming"):
        both, _ = sparse_attention(x.q, x.k, x.v, (Window(50), Sink(50)), reset=x.reset, path=path)
        torch.testing.assert_close(alone, both, rtol=0, atol=1e-12)


def test_full_attention_of_one_segment_is_that_of_pytorch() -> None:
    x = draw((Full(),), 100)
    wanted, held = sparse_attention(x.q, x.k, x.v, (Full(),), path="tiled")
    got, memory = sparse_attention(x.q, x.k, x.v, (Window(3), Full()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(memory, held, strict=True))


@pytest.mark.parametrize(
    ("name", "path"), [case for case in CASES if case[0] in {"hax", "lsh-rounds", "everything", "full"}]
)
def test_the_future_changes_no_bit_of_the_past(name: str, path: str) -> None:
    length, cut = 200, 117
    union, x = UNIONS[name], draw(UNIONS[name], length)
    other = draw(union, length, seed=11)

    def spliced(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[:, :cut], b[:, cut:]], 1)

    y, _ = sparse_attention(x.q, x.k, x.v, union, path=path, **x.part(0, length))
    mixed = Inputs(
        spliced(x.q, other.q),
        spliced(x.k, other.k),
        spliced(x.v, other.v),
        spliced(x.reset, other.reset),
        None if x.score is None or other.score is None else spliced(x.score, other.score),
        None
        if x.buckets is None or other.buckets is None
        else Buckets(spliced(x.buckets.q, other.buckets.q), spliced(x.buckets.k, other.buckets.k)),
    )
    z, _ = sparse_attention(mixed.q, mixed.k, mixed.v, union, path=path, **mixed.part(0, length))
    assert torch.equal(y[:, :cut], z[:, :cut])
    assert not torch.equal(y[:, cut:], z[:, cut:])


def test_float32_stays_near_float64() -> None:
    union, x = UNIONS["everything"], draw(UNIONS["everything"], 600)
    part = x.part(0, 600)
    wanted, _ = sparse_attention(x.q, x.k, x.v, union, path="tiled", **part)
    got, _ = sparse_attention(x.q.float(), x.k.float(), x.v.float(), union, path="tiled", **part)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", ["dense", "tiled", "streaming"])
def test_half_precision_keeps_its_type_and_sums_in_float32(path: str) -> None:
    union, x = UNIONS["everything"], draw(UNIONS["everything"], 200)
    part = x.part(0, 200)
    rounded = [t.detach().bfloat16() for t in (x.q, x.k, x.v)]
    wanted, _ = sparse_attention(*(t.double() for t in rounded), union, path=path, **part)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, memory = sparse_attention(*rounded, union, path=path, **part)
    assert got.dtype == memory.k.dtype == memory.v.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-5)


def test_merging_parts_equals_attending_to_their_union() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 10, 4, generator=g, dtype=torch.float64) for _ in range(3))
    first = torch.rand(3, 10, 10, generator=g) < 0.3
    second = (torch.rand(3, 10, 10, generator=g) < 0.3) & ~first
    whole = attend(q, k, v, first | second, 0.5).normalised()
    parts = merge([attend(q, k, v, mask, 0.5) for mask in (first, second)]).normalised()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


def test_selection_loss_prefers_scores_that_rank_keys_by_their_use() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 40, 1, 8, generator=g, dtype=torch.float64).abs()
    strength = torch.rand(2, 40, 1, generator=g, dtype=torch.float64)
    k = strength[..., None] * torch.ones(8, dtype=torch.float64)
    right = selection_loss(q, k, 20 * strength, n=40)
    wrong = selection_loss(q, k, -20 * strength, n=40)
    assert right < 0.3 < wrong
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 20] = True
    first = selection_loss(q[:, :20], k[:, :20], strength[:, :20], n=40)
    second = selection_loss(q[:, 20:], k[:, 20:], strength[:, 20:], n=40)
    packed = selection_loss(q, k, strength, n=40, reset=reset)
    torch.testing.assert_close(packed, (first + second) / 2)


def test_selection_loss_looks_at_the_queries_that_come_after_a_key() -> None:
    """Early queries ask for one key, late ones for the other; only the second is worth a slot from then on."""
    q, k = torch.zeros(1, 40, 1, 2), torch.zeros(1, 40, 1, 2)
    q[:, :20, :, 0], q[:, 20:, :, 1] = 1, 1
    k[:, 18, :, 0], k[:, 19, :, 1] = 10, 10
    asked_before, asked_after = torch.zeros(1, 40, 1), torch.zeros(1, 40, 1)
    asked_before[:, 18], asked_after[:, 19] = 1, 1
    assert selection_loss(q, k, asked_after, n=40) < selection_loss(q, k, asked_before, n=40)


def test_ranked_positions_are_distinct_and_have_no_period() -> None:
    at = ranked_positions(1000, 64, torch.device("cpu"))
    assert len(set(at.tolist())) == 64
    assert set(at.tolist()) <= set(range(1000))
    assert 20 < int((at % 2).sum()) < 44
    assert torch.equal(ranked_positions(5, 64, torch.device("cpu")), torch.arange(5))


def test_nearby_vectors_share_buckets_as_often_as_theory_says() -> None:
    g = torch.Generator().manual_seed(0)
    n_bits, angle = 3, 0.4
    planes = draw_planes(2, 1, 20_000, n_bits, g).double()
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y = torch.tensor([torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))], dtype=torch.float64)
    same = sign_buckets(x.view(1, 1, 1, 2), planes) == sign_buckets(y.view(1, 1, 1, 2), planes)
    assert abs(same.double().mean().item() - (1 - angle / torch.pi) ** n_bits) < 0.01


def test_dispatch_says_what_it_picks_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    explain = dispatch.explain_sparse_attention
    assert explain(1, 9000, (Window(4),)).path == "decode"
    assert explain(100_000, 0, (Window(4),)).path == "streaming"
    assert explain(100_000, 0, (Full(),), fresh=True).path == "sdpa"
    assert explain(100_000, 0, (Full(),)).path == "tiled"
    assert "meta" in explain(100_000, 0, (Window(4),), "meta").why
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    assert explain(100, 0, (Window(4),)).path == "dense"
    choice = explain(100_000, 0, (Window(4),))
    assert choice.path == "tiled"
    assert "4 keys per query" in choice.why


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "n_keys must be at least 1"),
        (lambda: Dilated(3, stride=0), "stride must be at least 1"),
        (lambda: Lsh(4, n_bits=0), "n_bits must be in 1..16"),
        (lambda: Lsh(5, n_bits=2, n_rounds=2), "multiple of n_rounds"),
        (lambda: check_patterns(()), "at least one pattern"),
        (lambda: check_patterns((Window(3), Window(4))), "given 2 times"),
    ],
)
def test_bad_patterns_say_what_is_wrong(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


def test_budgets_and_slots_of_unions_add_up() -> None:
    union = (Lsh(4, n_bits=3), KeySelection(5), Window(2))
    assert key_budget(union) == 11
    assert memory_slots(union) == 32 + 5 + 2
    assert key_budget((*union, Full())) is None
