"""Packing: nothing is lost or shared, rows fill well, and a packed sample cannot tell that it has neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.data.packing import PackedBatch, Places, one_per_row, pack, place
from recollect.layers.attention import Attention
from recollect.layers.gated_deltanet import GatedDeltaNet
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import Full, KeySelection, Lsh, Window
from recollect.tasks import JointRecall, TokenBatch
from recollect.tasks.base import Task
from recollect.tasks.batch import PAD

SMALL = JointRecall(JointRecall.Config(n_contexts=(1, 4), n_keys=(2, 5), n_values=5))


def lengths_of(task: Task, batch: TokenBatch) -> list[int]:
    return [task.length(tuple(size)) for size in batch.sizes.tolist()]


def unpacked(packed: PackedBatch, places: Places) -> list[tuple[Any, Any, Any]]:
    """Every sample's tokens, labels and mask, read back."""
    at = zip(places.row, places.start, places.length, strict=True)
    return [tuple(a[row, start : start + n] for a in packed[:3]) for row, start, n in at]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [None, 3, 9])
def test_unpacking_gives_back_exactly_the_samples(seed: int, rows: int | None) -> None:
    rng = np.random.default_rng(seed)
    batch = SMALL.mixed_batch(rng, int(rng.integers(1, 60)))
    lengths = lengths_of(SMALL, batch)
    places = place(lengths, int(rng.integers(SMALL.max_length, 3 * SMALL.max_length)), rows)
    packed = pack(batch, places)
    assert all(a.shape == places.shape and a.flags.owndata for a in packed)
    samples = unpacked(packed, places)
    assert len(samples) == len(batch.tokens) if rows is None else places.shape[0] == rows
    for i, (tokens, labels, mask) in enumerate(samples):
        assert (tokens == batch.tokens[i, : lengths[i]]).all()
        assert (labels == batch.labels[i, : lengths[i]]).all()
        assert (mask == batch.mask[i, : lengths[i]]).all()

    owners = np.zeros(places.shape, dtype=np.int64)
    first = np.zeros(places.shape, dtype=np.bool_)
    for row, start, n in zip(places.row, places.start, places.length, strict=True):
        owners[row, start : start + n] += 1
        first[row, start] = True
    assert owners.max() == 1
    assert (packed.reset == (first | (owners == 0))).all()
    assert not packed.mask[owners == 0].any()
    assert (packed.tokens[owners == 0] == PAD).all()
    assert (packed.labels[owners == 0] == PAD).all()
    assert places.filling == owners.mean()


def test_fixed_rows_take_the_samples_in_the_order_they_were_drawn() -> None:
    """Not the small ones first: they would be learned more often than they are drawn."""
    places = place([5, 9, 9, 1], 10, rows=2)
    assert places.length.tolist() == [5, 9]
    assert place([5, 9, 9, 1], 10).shape == (3, 10)
    assert place([5, 9, 1, 5], 10, rows=2).filling == 1.0
    assert place([4], 10, rows=3).filling == 4 / 30


def test_the_same_lengths_lie_in_the_same_places() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=100).tolist()
    one, two = place(lengths, 64), place(lengths, 64)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("fixed", [False, True])
def test_the_published_grid_fills_rows(fixed: bool) -> None:
    task, rng = JointRecall(), np.random.default_rng(1)
    cells = np.array([task.length(cell) for cell in task.cells()])
    drawn = [rng.choice(cells, 200 if fixed else 64).tolist() for _ in range(50)]
    filled = [place(lengths, task.max_length, 28 if fixed else None) for lengths in drawn]
    assert np.mean([places.filling for places in filled]) >= 0.93
    assert np.mean([len(places.length) for places in filled]) > 55
    if fixed:  # large samples are not passed over: the mean length placed is the mean length drawn
        mean = np.concatenate([places.length for places in filled]).mean()
        assert mean == pytest.approx(cells.mean(), rel=0.03)


def test_what_does_not_fit_is_an_error_of_one_line() -> None:
    for wrong in (lambda: place([3, 11, 4], 10), lambda: place([11], 10, 5), lambda: one_per_row([3, 11], 10)):
        with pytest.raises(ConfigError, match="a sample of 11 positions does not fit a row of 10; raise row_length"):
            wrong()
    with pytest.raises(ConfigError, match="no sample"):
        place([], 10)


def test_samples_drawn_one_by_one_are_of_the_sizes_asked_for() -> None:
    """The general form of ``batch_of``, and joint recall's own."""
    sizes = np.array([[1, 5], [4, 2], [2, 2], [4, 5]])
    for draw in (Task.batch_of, JointRecall.batch_of):
        batch = draw(SMALL, np.random.default_rng(0), sizes, split="train")
        assert (batch.sizes == sizes).all()
        lengths = lengths_of(SMALL, batch)
        assert batch.tokens.shape == (4, max(lengths))
        assert batch.mask.sum(1).tolist() == [5, 8, 4, 20]
        for tokens, labels, n in zip(batch.tokens, batch.labels, lengths, strict=True):
            assert (tokens[1:n] == labels[: n - 1]).all()
            assert (tokens[n + 1 :] == PAD).all()
            assert (labels[n:] == PAD).all()
        with pytest.raises(ConfigError, match=r"size \(4, 6\) is outside"):
            draw(SMALL, np.random.default_rng(0), np.array([[1, 2], [4, 6]]))


def hax(*patterns: Any, **options: Any) -> HAX.Config:
    return HAX.Config(8, mixer=Mamba2.Config.tiny(), patterns=patterns, d_key=4, **options)


LAYERS: dict[str, LayerConfig] = {
    "mamba2": Mamba2.Config.tiny(),
    "hax": hax(Lsh(4, n_bits=2), KeySelection(5), selection="gate"),
    "hax+window": hax(Lsh(4, n_bits=2), KeySelection(3), Window(4)),
    "hax-full": hax(Full()),
    "attention": Attention.Config(8, n_heads=2, window=None),
    "gated_deltanet": GatedDeltaNet.Config.tiny(),
    "gru": GRU.Config.tiny(),
}


def tensors(packed: PackedBatch) -> list[Tensor]:
    return [torch.from_numpy(a) for a in packed]


@pytest.mark.parametrize("name", LAYERS)
def test_neighbours_leave_no_trace(name: str) -> None:
    """Packed, padded and one by one: the same loss and gradients. ``aux_weight`` is 0, as key selection's own loss
    samples positions by their place in the row.
    """
    backbone = Backbone.Config(8, layers=(LAYERS[name], LAYERS[name]))
    model = LanguageModel(LanguageModel.Config(SMALL.vocab_size, backbone, embedding_std=1.0, aux_weight=0.0)).double()
    batch = SMALL.mixed_batch(np.random.default_rng(0), 9)
    lengths = lengths_of(SMALL, batch)
    asked = batch.mask.sum()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]

    alone: list[tuple[Tensor, list[Tensor]]] = []
    for i, n in enumerate(lengths):
        tokens, labels, mask = (torch.from_numpy(a[i : i + 1, :n]) for a in batch[:3])
        loss = model.loss(tokens, labels, mask)[0] * (batch.mask[i].sum() / asked)
        alone.append((loss.detach(), gradients(loss)))
    wanted = torch.stack([loss for loss, _ in alone]).sum()
    wanted_grads = [torch.stack(each).sum(0) for each in zip(*(grads for _, grads in alone), strict=True)]
    assert max(float(g.abs().max()) for g in wanted_grads) > 1e-3

    for places in (place(lengths, 110), place(lengths, 200), one_per_row(lengths), one_per_row(lengths, 130)):
        loss, metrics = model.loss(*tensors(pack(batch, places)))
        assert set(metrics) >= {"cross_entropy"}
        torch.testing.assert_close(loss.detach(), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients(loss), wanted_grads, rtol=1e-9, atol=1e-9)


SPARSE = {
    "ranking": ("selection", SparseAttention.Config(8, d_key=4, patterns=(KeySelection(3),), samples=1000)),
    "ranking-sum": (
        "selection",
        SparseAttention.Config(8, d_key=4, patterns=(KeySelection(3),), samples=1000, selection_target="sum"),
    ),
    "kl": ("selection", SparseAttention.Config(8, d_key=4, patterns=(KeySelection(3),), samples=1000, selection="kl")),
}
"""What teaches the selection, looking at every position. The hash's loss scales its codes by the whole batch, and so is
held to its segments where it is defined (``test_hax.py``)."""


@pytest.mark.parametrize("name", SPARSE)
def test_losses_of_layers_see_each_sample_alone_and_padding_not_at_all(name: str) -> None:
    """Summed instead of averaged, the loss of a packed row is that of its samples. Padding adds a constant or nothing:
    each of its positions is a segment of its own, which has no pair of keys to rank and one key to attend to.
    """
    which, config = SPARSE[name]
    layer = SparseAttention(config).double().train()
    lengths = [7, 12, 9]
    places = place(lengths, 36, 1)
    assert places.filling < 1
    # What a sum over a segment of n keys is a mean of: pairs, or keys, or queries.
    weigh = (lambda n: n * n) if name.startswith("ranking") else (lambda n: n)
    padding = 36 - sum(lengths)
    constant = padding * np.log(2) if name.startswith("ranking") else 0.0
    x = torch.randn(1, 36, 8, dtype=torch.float64, requires_grad=True)
    reset = torch.ones(1, 36, dtype=torch.bool)
    apart = torch.zeros((), dtype=torch.float64)
    for start, n in zip(places.start, places.length, strict=True):
        reset[0, start + 1 : start + n] = False
        apart = apart + layer(x[:, start : start + n]).aux[which] * weigh(n)
    whole = layer(x, reset=reset).aux[which] * (sum(map(weigh, lengths)) + padding) - constant
    torch.testing.assert_close(whole, apart, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True) for loss in (whole, apart)]
    assert any(g is not None and g.abs().max() > 1e-4 for g in grads[1])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
