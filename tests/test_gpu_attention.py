"""Sparse attention by Triton's kernels, in its interpreter without a GPU: values, gradients and memories."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.hashing import draw_planes, sign_buckets
from recollect.ops.patterns import Dilated, KeySelection, Lsh, Pattern, Sink, Window, find
from recollect.ops.sparse_attention import (
    Buckets,
    Memory,
    init_memory,
    sparse_attention,
    sparse_attention_reference,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAX = (Lsh(4, n_bits=1), KeySelection(5))
MIXED = (Lsh(4, n_bits=1), Window(3), Sink(2))  # both kinds of pass, and little bookkeeping for an interpreter
EVERYTHING = (Lsh(4, n_bits=1, n_rounds=2), KeySelection(5), Window(3), Sink(1), Dilated(2, stride=7))
UNIONS: dict[str, tuple[Pattern, ...]] = {
    "window": (Window(5),),
    "sink": (Sink(4),),
    "dilated": (Dilated(3, stride=4),),
    "key-selection": (KeySelection(6),),
    "lsh": (Lsh(4, n_bits=2),),
    "lsh, 3 rounds": (Lsh(6, n_bits=1, n_rounds=3),),
    "hax": HAX,
    "everything": EVERYTHING,
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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


def draw(
    union: tuple[Pattern, ...],
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    widths: tuple[int, int] = (20, 33),
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """q and k are views of one array, as a layer has them; scores tie."""
    g = torch.Generator().manual_seed(0)
    d_key, d_value = widths
    both = torch.randn(batch, length, 2, heads, d_key, generator=g).to(dtype)
    v = torch.randn(batch, length, heads, d_value, generator=g).to(dtype)
    reset = torch.rand(batch, length, generator=g) < 0.03
    score = torch.randn(batch, length, heads, generator=g).mul(3).round() if find(union, KeySelection) else None
    lsh = find(union, Lsh)
    codes = None
    if lsh is not None:
        planes = draw_planes(d_key, heads, lsh.n_rounds, lsh.n_bits, g)
        codes = [sign_buckets(x.float(), planes).to(DEVICE) for x in both.unbind(2)]
    q, k = (x.requires_grad_() for x in both.to(DEVICE).unbind(2))
    score = None if score is None else score.to(DEVICE)
    return Inputs(
        q, k, v.to(DEVICE).requires_grad_(), reset.to(DEVICE), score, None if codes is None else Buckets(*codes)
    )


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def assert_equals_reference(union: tuple[Pattern, ...], x: Inputs) -> None:
    part = x.part(0, x.q.shape[1])
    got, _ = sparse_attention(x.q, x.k, x.v, union, path="triton", **part)
    precise = [t.detach().double().requires_grad_() for t in x[:3]]
    wanted, _ = sparse_attention_reference(*precise, union, **part)
    assert got.dtype == x.v.dtype
    tolerance = TOLERANCES[x.q.dtype]
    assert error(got, wanted) < tolerance
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(got)
    found = torch.autograd.grad((got * weight).sum(), x[:3])
    for grad, true in zip(found, torch.autograd.grad((wanted * weight).sum(), precise), strict=True):
        assert grad.dtype == x.q.dtype
        if float(true.norm()) == 0:  # one key: its weight is 1 whatever the query
            assert float(grad.abs().max()) < tolerance
        else:
            assert error(grad, true) < tolerance


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("name", UNIONS)
def test_values_and_gradients_equal_the_reference(name: str) -> None:
    length = 40 if name == "lsh, 3 rounds" else 65  # only slots know chunks, of 64
    assert_equals_reference(UNIONS[name], draw(UNIONS[name], length, heads=2 if name == "sink" else 1))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "batch"), [(1, 3), (23, 3), (63, 1), (130, 1)])
def test_odd_lengths_and_batches_equal_the_reference(length: int, batch: int) -> None:
    assert_equals_reference(MIXED, draw(MIXED, length, batch=batch, heads=1, widths=(16, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_the_reference(dtype: torch.dtype) -> None:
    assert_equals_reference(MIXED, draw(MIXED, 65, heads=1, dtype=dtype))


def test_wide_heads_are_taken_in_parts_of_a_chunk() -> None:
    assert_equals_reference(MIXED, draw(MIXED, 70, heads=1, widths=(130, 256)))


@pytest.mark.usefixtures("poisoned_empty")
def test_a_memory_carried_in_gets_the_gradients_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    split, length = 28, 75  # key 27 is remembered by the window, until query 30, and by the dilation
    x = draw(EVERYTHING, length, heads=1)
    x.reset[:] = torch.arange(length, device=DEVICE) == 60
    weight = torch.randn(1, length - split, 1, 33, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(path: str, dtype: torch.dtype) -> tuple[Tensor, Memory, tuple[Tensor, ...]]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in x[:3])
        memory = init_memory(EVERYTHING, 1, 1, 20, 33, device=DEVICE, dtype=dtype)
        old, new = slice(0, split), slice(split, length)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "KERNELS", "torch")
            _, memory = sparse_attention(
                q[:, old], k[:, old], v[:, old], EVERYTHING, memory=memory, path="dense", **x.part(0, split)
            )
        held = memory._replace(k=memory.k.detach().requires_grad_(), v=memory.v.detach().requires_grad_())
        y, after = sparse_attention(
            q[:, new], k[:, new], v[:, new], EVERYTHING, memory=held, path=path, **x.part(split, length)
        )
        grads = torch.autograd.grad((y * weight.to(dtype)).sum(), (q, k, v, held.k, held.v))
        return y, after, grads

    y, after, grads = run("triton", torch.float32)
    true_y, true_after, true_grads = run("dense", torch.float64)
    assert error(y, true_y) < 1e-5
    assert error(after.v, true_after.v) < 1e-6
    assert torch.equal(after.position, true_after.position)
    assert float(true_grads[3].norm()) > 0.1
    for grad, true in zip(grads, true_grads, strict=True):
        assert error(grad, true) < 1e-5


@pytest.mark.usefixtures("poisoned_empty")
def test_queries_without_keys_give_zero_and_get_no_gradient() -> None:
    union = (Lsh(4, n_bits=1),)
    q, k, v = draw(union, 65)[:3]
    code = torch.zeros(1, 65, 2, 1, dtype=torch.int64, device=DEVICE)
    asked = code.clone()
    asked[:, ::2] = 1  # the bucket of no key
    y, _ = sparse_attention(q, k, v, union, buckets=Buckets(asked, code), path="triton")
    assert not y[:, ::2].any()
    assert y[:, 1::2].abs().amax(-1).min() > 0
    dq, dk, dv = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert not dq[:, ::2].any()
    assert all(bool(d.isfinite().all()) and bool(d.any()) for d in (dq, dk, dv))


def test_what_comes_later_leaves_every_bit_of_what_came_before() -> None:
    x, length = draw(MIXED, 90, heads=1), 66
    assert x.buckets is not None
    ys: list[Tensor] = []
    for sign in (1, -1):
        later = torch.ones(90, 1, 1, device=DEVICE).index_fill_(0, torch.arange(length, 90, device=DEVICE), sign)
        q, k, v = (t.detach() * later for t in x[:3])
        codes = Buckets(*(torch.where(later > 0, code, 1 - code) for code in x.buckets))
        ys.append(sparse_attention(q, k, v, MIXED, buckets=codes, path="triton")[0])
    assert torch.equal(ys[0][:, :length], ys[1][:, :length])
    assert not torch.equal(ys[0], ys[1])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("union", "steps", "dtype"),
    [
        ((Sink(2), Dilated(2, stride=3)), 14, torch.float32),
        ((Lsh(2, n_bits=1), KeySelection(3)), 14, torch.bfloat16),
        ((Lsh(2, n_bits=1, n_rounds=2), KeySelection(2), Window(2)), 10, torch.float32),
    ],
)
def test_decoding_equals_pytorch_step_by_step(
    union: tuple[Pattern, ...], steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory bit for bit, whatever the step; resets in the middle."""
    x = draw(union, steps, heads=1, dtype=dtype)
    x.reset[:, 8] = True
    memory = init_memory(union, 1, 1, 20, 33, device=DEVICE, dtype=dtype)
    for t in range(steps):
        at = slice(t, t + 1)
        before = [field.clone() for field in memory]
        outputs: list[tuple[Tensor, Memory]] = []
        for kernels in ("triton", "torch"):
            monkeypatch.setattr(dispatch, "KERNELS", kernels)
            with torch.no_grad():
                inputs = (x.q[:, at], x.k[:, at], x.v[:, at], union)
                outputs.append(sparse_attention(*inputs, memory=memory, path="decode", **x.part(t, t + 1)))
        (y, after), (wanted, wanted_after) = outputs
        assert all(torch.equal(a, b) for a, b in zip(before, memory, strict=True))
        assert y.dtype == wanted.dtype
        assert error(y, wanted) < TOLERANCES[dtype]
        for field, true in zip(after, wanted_after, strict=True):
            assert field.dtype == true.dtype
            assert torch.equal(field, true)
        memory = after


def test_decoding_with_a_gradient_is_left_to_pytorch() -> None:
    x = draw((Window(3),), 1)
    y, _ = sparse_attention(x.q, x.k, x.v, (Window(3),), path="decode")
    (dv,) = torch.autograd.grad(y.sum(), x.v)
    assert torch.equal(dv, torch.ones_like(dv))


def test_dispatch_says_when_kernels_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(length: int = 4096, width: int = 64, dtype: torch.dtype = torch.float32) -> dispatch.Choice:
        return dispatch.explain_sparse_attention(length, 0, HAX, DEVICE, dtype, width=width)

    assert choice().path == "triton"
    assert choice(256).path == "dense"
    assert choice(width=257).path == "tiled"
    assert "257" in choice(width=257).why
    assert choice(dtype=torch.float64).path == "tiled"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choice().path == "tiled"
    assert "deterministic" in choice().why
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    assert choice().path == "tiled"


def test_the_default_execution_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "DENSE_SOURCES", 8)
    union = (Window(5),)
    x = draw(union, 40)
    y, _ = sparse_attention(x.q, x.k, x.v, union)
    assert y.grad_fn is not None
    wanted, _ = sparse_attention(x.q, x.k, x.v, union, path="dense")
    assert not torch.equal(y, wanted)  # the same to rounding only, so it was another execution
    assert error(y, wanted) < 1e-5
