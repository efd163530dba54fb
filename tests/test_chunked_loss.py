"""The loss of a long text without its logits: the same numbers, the same gradients, the memory of a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from asked import Asked
from recollect.models import chunked_loss
from recollect.models.backbone import Backbone
from recollect.models.chunked_loss import chunked_cross_entropy, counting, masked_cross_entropy
from recollect.models.language_model import LanguageModel

B, L, D, V = 3, 17, 8, 29


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.randn(B, L, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return h, weight, torch.randint(V, (B, L)), torch.rand(B, L) < 0.6


def plain(h: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h[mask], weight)
    return F.cross_entropy(logits, labels[mask]), (logits.argmax(-1) == labels[mask]).sum()


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_value_and_gradients_are_those_of_whole_logits(chunk: int) -> None:
    h, weight, labels, mask = example()
    wanted, right = plain(h, weight, labels, mask)
    expected = torch.autograd.grad(3 * wanted, (h, weight))
    loss, n_right = chunked_cross_entropy(h, weight, labels, mask, chunk)
    found = torch.autograd.grad(3 * loss, (h, weight))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert n_right == right
    assert n_right.dtype == torch.int64
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    every, _ = chunked_cross_entropy(h, weight, labels, chunk=chunk)
    torch.testing.assert_close(every, F.cross_entropy(F.linear(h, weight).flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("which", ["h", "weight", "neither"])
def test_only_what_is_asked_for_gets_a_gradient(which: str) -> None:
    h, weight, labels, mask = example()
    h, weight = h.detach().requires_grad_(which == "h"), weight.detach().requires_grad_(which == "weight")
    loss, _ = chunked_cross_entropy(h, weight, labels, mask, 5)
    assert loss.requires_grad == (which != "neither")
    if loss.requires_grad:
        loss.backward()
        expected, _ = plain(h, weight, labels, mask)
        leaf = h if which == "h" else weight
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(expected, leaf)[0])


def test_large_logits_do_not_overflow() -> None:
    h, weight, labels, mask = example(torch.float32)
    loss, _ = chunked_cross_entropy(h * 1000, weight * 1000, labels, mask, 4)
    wanted, _ = plain(h * 1000, weight * 1000, labels, mask)
    torch.testing.assert_close(loss, wanted)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, weight)))


def test_under_autocast_products_are_bf16_and_sums_float32() -> None:
    h, weight, labels, mask = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, _ = plain(h, weight, labels, mask)
        loss, _ = chunked_cross_entropy(h, weight, labels, mask, 5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    exact, _ = plain(h, weight, labels, mask)
    assert (loss - exact).abs() > 1e-5, "the products were not made in bf16"
    expected = torch.autograd.grad(wanted, (h, weight))
    found = torch.autograd.grad(loss, (h, weight))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("outside", [0, -100])
def test_all_positions_or_the_masked_ones_make_the_same_means(outside: int) -> None:
    h, weight, labels, mask = example()
    labels = labels.masked_fill(~mask, outside)
    found = {select: masked_cross_entropy(h, weight, labels, mask, select=select) for select in (True, False)}
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, check_dtype=False)
    gradients = [torch.autograd.grad(loss, (h, weight)) for loss, _ in found.values()]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert gradients[1][0][~mask].eq(0).all()


def test_all_positions_ask_for_no_number() -> None:
    h, weight, labels, mask = example()
    with Asked() as asked:
        masked_cross_entropy(h, weight, labels, mask, select=False)[0].backward()
    assert asked.names == []
    with Asked() as asked:
        masked_cross_entropy(h, weight, labels, mask)
    assert asked.names, "on a CPU the masked ones are taken"


def test_nothing_masked_is_no_mean_but_no_part_of_one_either() -> None:
    h, weight, labels, mask = example()
    nothing = torch.zeros_like(mask)
    assert chunked_cross_entropy(h, weight, labels, nothing, 4)[0].isnan()
    assert masked_cross_entropy(h, weight, labels, nothing)[0].isnan()
    with counting(0.0):
        loss, accuracy = masked_cross_entropy(h, weight, labels, nothing)
    assert (loss.item(), accuracy.item()) == (0.0, 0.0)
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (h, weight)))
    assert masked_cross_entropy(h, weight, labels, nothing, select=False)[0].isnan()
    with counting(0.0):
        loss, accuracy = masked_cross_entropy(h, weight, labels, nothing, select=False)
    assert (loss.item(), accuracy.item()) == (0.0, 0.0)
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (h, weight)))


@pytest.mark.parametrize("whole", [10**9, 0])
def test_the_means_of_parts_make_the_mean(monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(chunked_loss, "WHOLE", whole)
    h, weight, labels, mask = example()
    wanted = masked_cross_entropy(h, weight, labels, mask)
    found: list[tuple[Tensor, Tensor]] = []
    for row in range(B):
        with counting(float(B * mask[row].sum() / mask.sum())):
            found.append(masked_cross_entropy(h[row : row + 1], weight, labels[row : row + 1], mask[row : row + 1]))
    for a, b in zip(wanted, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(sum(b) / B, a, rtol=1e-6, atol=0, check_dtype=False)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that was made."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.n = max(self.n, made.numel())
        return made


def test_a_language_model_changes_over_where_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(LanguageModel.Config(V, Backbone.Config.tiny())).train()
    tokens, labels, mask = torch.randint(V, (B, L)), torch.randint(V, (B, L)), torch.ones(B, L, dtype=torch.bool)

    def gradient() -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        model.zero_grad()
        loss, metrics = model.loss(tokens, labels, mask)
        loss.backward()
        return loss.detach(), metrics, [p.grad for p in model.parameters() if p.grad is not None]

    loss, metrics, grads = gradient()
    logits = F.linear(model.hidden(tokens)[0][mask], model.embedding.weight)
    assert torch.equal(loss, F.cross_entropy(logits, labels[mask]).detach()), "few logits: to the bit as ever"
    monkeypatch.setattr(chunked_loss, "WHOLE", 4 * V)
    chunked, their_metrics, their_grads = gradient()
    torch.testing.assert_close(chunked, loss)
    assert not torch.equal(their_grads[0], grads[0]), "it never changed over"
    assert metrics.keys() == their_metrics.keys()
    torch.testing.assert_close(metrics["accuracy"], their_metrics["accuracy"])
    for a, b in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_tensor_holds_all_logits() -> None:
    h, weight = torch.randn(300, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    labels = torch.randint(100, (300,))
    with Largest() as largest:
        chunked_cross_entropy(h, weight, labels, None, 10)[0].backward()
    assert largest.n <= max(10 * 100, 300 * 4)
