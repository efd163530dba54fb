"""Sparse attention in time order: what the memory holds, decoding, and what only the compiled loop has to mind."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.patterns import Dilated, KeySelection, Lsh, Pattern, Sink, Window, find
from recollect.ops.sparse_attention import (
    Buckets,
    Memory,
    init_memory,
    sparse_attention,
    sparse_attention_reference,
)

EVERYTHING = (KeySelection(5), Lsh(4, n_bits=2, n_rounds=2), Window(3), Sink(1), Dilated(2, stride=7))
PATHS = ("decode", "streaming", "tiled", "dense")


def draw(
    union: tuple[Pattern, ...],
    length: int,
    *,
    heads: int = 2,
    widths: tuple[int, int] = (4, 3),
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Buckets | None]:
    """q, k, v with gradients; scores that tie; buckets at random."""
    q, k, v = (
        torch.randn(batch, length, heads, width, dtype=dtype, requires_grad=True)
        for width in (widths[0], widths[0], widths[1])
    )
    lsh = find(union, Lsh)
    buckets = None
    if lsh is not None:
        buckets = Buckets(*(torch.randint(0, 1 << lsh.n_bits, (batch, length, heads, lsh.n_rounds)) for _ in range(2)))
    return (q, k, v), torch.randn(batch, length, heads, dtype=dtype).mul(2).round(), buckets


def fold(
    union: tuple[Pattern, ...],
    qkv: tuple[Tensor, Tensor, Tensor],
    score: Tensor,
    buckets: Buckets | None,
    reset: Tensor | None,
    cuts: list[int],
    path: str,
    memory: Memory,
) -> tuple[Tensor, Memory]:
    """``sparse_attention`` in parts that end at ``cuts``."""
    outputs = []
    for begin, stop in zip([0, *cuts[:-1]], cuts, strict=True):
        at = slice(begin, stop)
        y, memory = sparse_attention(
            *(x[:, at] for x in qkv),
            union,
            memory=memory,
            reset=None if reset is None else reset[:, at],
            score_BLH=score[:, at],
            buckets=None if buckets is None else Buckets(buckets.q[:, at], buckets.k[:, at]),
            path=path,
        )
        outputs.append(y)
    return torch.cat(outputs, 1), memory


def held_by_definition(union: tuple[Pattern, ...], score: Tensor, codes: Tensor, reset: Tensor) -> list[int]:
    """Times that every region holds after the last position, for one sequence of one head, -1 for an empty slot."""
    since = max([0, *reset.nonzero().flatten().tolist()])
    seen = list(range(since, len(reset)))

    def padded(times: list[int], n: int) -> list[int]:
        return times + [-1] * (n - len(times))

    slots: list[list[int]] = []
    rings: list[list[int]] = []
    for pattern in union:
        if isinstance(pattern, Window):
            slots.append(padded(seen[-pattern.n_keys :], pattern.n_keys))
        elif isinstance(pattern, Sink):
            slots.append(padded(seen[: pattern.n_keys], pattern.n_keys))
        elif isinstance(pattern, Dilated):
            grid = [t for t in seen if (t - since) % pattern.stride == pattern.stride - 1]
            slots.append(padded(grid[-pattern.n_keys :], pattern.n_keys))
        elif isinstance(pattern, KeySelection):
            best = sorted(seen, key=lambda t: (float(score[t]), t))[-pattern.n_keys :]
            slots.append(padded(sorted(best), pattern.n_keys))
        elif isinstance(pattern, Lsh):
            n = pattern.n_keys // pattern.n_rounds
            for r in range(pattern.n_rounds):
                in_bucket = [[t for t in seen if codes[t, r] == b] for b in range(1 << pattern.n_bits)]
                rings.extend(padded(times[-n:], n) for times in in_bucket)
    return list(chain(*slots, *rings))


@pytest.mark.parametrize("path", PATHS)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 40),
    reset_rate=st.sampled_from([0.0, 0.1, 0.5]),
    n_keys=st.integers(1, 5),
)
def test_regions_hold_what_their_definition_says(
    path: str, seed: int, length: int, reset_rate: float, n_keys: int
) -> None:
    torch.manual_seed(seed)
    union = (Window(n_keys), Lsh(2 * n_keys, n_bits=2, n_rounds=2), KeySelection(n_keys), Sink(2), Dilated(2, stride=3))
    (q, _, v), score, buckets = draw(union, length, heads=1, batch=1)
    assert buckets is not None
    reset = torch.rand(1, length) < reset_rate
    k = torch.arange(1.0, length + 1, dtype=torch.float64).view(1, -1, 1, 1).expand(1, -1, 1, 4)
    cuts = list(range(1, length + 1)) if path == "decode" else [(length + 1) // 2, length][-min(length, 2) :]
    memory = init_memory(union, 1, 1, 4, 3, dtype=torch.float64)
    _, memory = fold(union, (q, k, v), score, buckets, reset, cuts, path, memory)
    wanted = held_by_definition(union, score[0, :, 0], buckets.k[0, :, 0], reset[0])
    assert (memory.k[0, 0, :, 0].long() - 1).tolist() == wanted
    since = max([0, *reset[0].nonzero().flatten().tolist()])
    assert memory.position[0, 0].tolist() == [t - since if t >= 0 else -1 for t in wanted]
    assert memory.next_position.tolist() == [length - since]
    chosen = wanted[n_keys : 2 * n_keys]
    assert memory.score[0, 0].tolist() == [float(score[0, t, 0]) if t >= 0 else 0.0 for t in chosen]


@pytest.mark.parametrize("path", PATHS)
def test_a_copy_of_a_key_gives_its_gradient_to_the_slot_that_is_read(path: str) -> None:
    """Copies in several regions are separate inputs; every execution must read the same one of them."""
    lived, length = 30, 25
    (_, _, _), _, _ = draw(EVERYTHING, 1)
    qkv, score, buckets = draw(EVERYTHING, lived + length)
    assert buckets is not None
    empty = init_memory(EVERYTHING, 2, 2, 4, 3, dtype=torch.float64)
    before = Buckets(buckets.q[:, :lived], buckets.k[:, :lived])
    with torch.no_grad():
        _, memory = fold(EVERYTHING, tuple(x[:, :lived] for x in qkv), score, before, None, [lived], "dense", empty)
    after = Buckets(buckets.q[:, lived:], buckets.k[:, lived:])
    weight_y, weight_m = torch.randn(2, length, 2, 3), torch.randn(memory.k.shape)

    def gradients(way: str, cuts: list[int]) -> tuple[Tensor, ...]:
        leaves = [memory.k.clone().requires_grad_(), memory.v.clone().requires_grad_()]
        held = memory._replace(k=leaves[0], v=leaves[1])
        rest = tuple(x[:, lived:] for x in qkv)
        y, left = fold(EVERYTHING, rest, score[:, lived:], after, None, cuts, way, held)
        loss = (y * weight_y).sum() + (left.k * weight_m).sum()
        return torch.autograd.grad(loss, [*leaves, *qkv])

    cuts = list(range(1, length + 1)) if path == "decode" else [11, length]
    for got, wanted in zip(gradients(path, cuts), gradients("dense", [length]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["streaming", "tiled", "decode"])
def test_a_reset_at_any_place_begins_anew(path: str) -> None:
    length = 12
    qkv, score, buckets = draw(EVERYTHING, length)
    assert buckets is not None
    memory = init_memory(EVERYTHING, 2, 2, 4, 3, dtype=torch.float64)
    cuts = list(range(1, length + 1)) if path == "decode" else [length]
    for at in range(length):
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[0, at] = True
        got, _ = fold(EVERYTHING, qkv, score, buckets, reset, cuts, path, memory)
        wanted, _ = sparse_attention_reference(*qkv, EVERYTHING, reset=reset, score_BLH=score, buckets=buckets)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_decoding_stays_with_the_parallel_form_for_thousands_of_steps(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", setting)
    length, union = 2000, (Lsh(8, n_bits=4), KeySelection(8))
    qkv, score, buckets = draw(union, length, batch=1, dtype=torch.float32)
    memory = init_memory(union, 1, 2, 4, 3)
    reset = torch.rand(1, length) < 0.001
    with torch.no_grad():
        whole, left = fold(union, qkv, score, buckets, reset, [length], "auto", memory)
        steps, after = fold(union, qkv, score, buckets, reset, list(range(1, length + 1)), "auto", memory)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)
    for one, other in zip(after, left, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(1, 1), (16, 40), (33, 70), (48, 130)])
def test_streaming_with_rows_of_any_width(widths: tuple[int, int], dtype: torch.dtype) -> None:
    union = (Lsh(6, n_bits=2), KeySelection(35))
    qkv, score, buckets = draw(union, 90, widths=widths, dtype=dtype)
    reset = torch.rand(2, 90) < 0.02
    sets = {"reset": reset, "score_BLH": score, "buckets": buckets}
    wanted, _ = sparse_attention_reference(*qkv, union, **sets)
    got, _ = sparse_attention(*qkv, union, path="streaming", **sets)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * weight).sum(), qkv) for y in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


def test_streaming_with_as_many_buckets_as_there_may_be() -> None:
    union = (Lsh(4, n_bits=16, n_rounds=2), Window(2))
    qkv, score, buckets = draw(union, 100, batch=1, heads=1)
    assert buckets is not None
    few = Buckets(*(x % 7 * 9362 for x in buckets))  # far apart
    wanted, _ = sparse_attention_reference(*qkv, union, buckets=few)
    memory = init_memory(union, 1, 1, 4, 3, dtype=torch.float64)
    got, _ = fold(union, qkv, score, few, None, [37, 100], "streaming", memory)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_the_number_of_threads_changes_no_bit() -> None:
    qkv, score, buckets = draw(EVERYTHING, 70, batch=3)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            y, memory = sparse_attention(*qkv, EVERYTHING, score_BLH=score, buckets=buckets, path="streaming")
            results.append([y, *memory, *torch.autograd.grad(y.sin().sum(), qkv)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_decoding_costs_no_more_operations_late_than_early() -> None:
    """The shapes that a step works on are those of the memory, which does not grow."""
    qkv, score, buckets = draw(EVERYTHING, 300, batch=1)
    memory = init_memory(EVERYTHING, 1, 2, 4, 3, dtype=torch.float64)
    sizes = []
    for cuts in ([5], [300]):
        at = slice(0, cuts[-1])
        part = Buckets(buckets.q[:, at], buckets.k[:, at]) if buckets else None
        _, left = fold(EVERYTHING, tuple(x[:, at] for x in qkv), score[:, at], part, None, cuts, "auto", memory)
        sizes.append([leaf.shape for leaf in left])
    assert sizes[0] == sizes[1]


def test_scores_that_are_not_numbers_break_nothing_but_themselves() -> None:
    union = (KeySelection(3),)
    qkv, score, _ = draw(union, 40)
    score[0, 5:] = torch.nan
    for path in ("streaming", "tiled", "dense"):
        y, memory = sparse_attention(*qkv, union, score_BLH=score, path=path)
        assert y.isfinite().all()
        assert int(memory.position.max()) < 40
        wanted, _ = sparse_attention_reference(*qkv, union, score_BLH=score)
        torch.testing.assert_close(y[1], wanted[1], rtol=0, atol=1e-12)
