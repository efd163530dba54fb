"""What a model attends to is read off its layers without a trace, and agrees with a computation by hand."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from recollect.core.layer import LayerConfig
from recollect.core.seeding import Streams
from recollect.eval.attended import attended
from recollect.layers.attention import Attention
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.attention_map import admitted_by, attention_weights
from recollect.ops.patterns import Full, KeySelection, Lsh, Sink, Window
from recollect.ops.sparse_attention import key_sets_reference
from recollect.tasks import JointRecall
from recollect.tasks.base import Task
from recollect.tasks.batch import Ints, TokenBatch
from recollect.train.recall import RecallConfig

TASK = JointRecall.Config(n_contexts=(2, 3), n_keys=(2, 3), n_values=4)
LOOKED_AT: dict[str, LayerConfig] = {
    **{f"sparse-{name}": config for name, config in SparseAttention.Config.declared().items()},
    **{f"attention-{name}": config for name, config in Attention.Config.declared().items()},
}


def model_of(*layers: LayerConfig) -> LanguageModel:
    torch.manual_seed(0)
    vocabulary = TASK.build().vocab_size
    return LanguageModel(LanguageModel.Config(vocabulary, Backbone.Config(8, layers), embedding_std=1.0)).eval()


def hax(*patterns: Any, **options: Any) -> HAX.Config:
    return HAX.Config(8, mixer=Mamba2.Config.tiny(), patterns=patterns, d_key=4, **options)


def streams(name: str) -> np.random.Generator:
    return Streams(3).numpy("eval", name)


@pytest.mark.parametrize("name", sorted(LOOKED_AT))
def test_the_weights_are_those_the_layer_computes_with(name: str) -> None:
    torch.manual_seed(1)
    config = LOOKED_AT[name]
    layer = cast(Any, config.build().double().eval())
    x = torch.randn(2, 40, config.d_model, dtype=torch.float64)
    inputs = layer.attention_inputs(x)
    admitted = admitted_by(inputs)
    weights = attention_weights(inputs, admitted.any(0))
    total = weights.sum(-1)
    assert torch.allclose(total, admitted.any(0).any(-1).double())
    assert (weights[~admitted.any(0)] == 0).all()
    if isinstance(layer, Attention):
        heads, c = layer.config.n_heads, layer.config
        v = layer.to_qkv(x).unflatten(-1, (-1, layer.d_head))[:, :, heads + c.kv_heads :]
        v = v.repeat_interleave(heads // c.kv_heads, 2)
    else:
        v = layer.to_v(x).unflatten(-1, (layer.config.n_heads, layer.d_value))
    y = layer.out(torch.einsum("bhls,bshp->blhp", weights, v).flatten(-2))
    torch.testing.assert_close(y, layer(x).y, rtol=1e-9, atol=1e-9)
    for mask, pattern in zip(admitted, inputs.patterns, strict=True):
        wanted = key_sets_reference(inputs.q_BLHN, (pattern,), score_BLH=inputs.score_BLH, buckets=inputs.buckets)
        assert (mask == wanted).all(), pattern.kind


def test_told_at_is_where_the_value_stands() -> None:
    task = TASK.build()
    batch = task.mixed_batch(np.random.default_rng(0), 20)
    place = task.told_at(batch)
    assert place is not None
    assert ((place >= 0) == batch.mask).all()
    row, column = np.nonzero(batch.mask)
    assert (batch.tokens[row, place[row, column]] == batch.labels[row, column]).all()
    assert (batch.tokens[row, place[row, column] - 1] == batch.tokens[row, column]).all()
    for r, c, p in zip(row, column, place[row, column], strict=True):
        contexts = np.flatnonzero(batch.tokens[r] >= task.first_context)
        assert batch.tokens[r, contexts[contexts < c][-1]] == batch.tokens[r, contexts[contexts < p][-1]]


@torch.no_grad()
def test_shares_and_arrays_agree_with_a_count_by_hand() -> None:
    model, task = model_of(hax(Lsh(4, n_bits=1), KeySelection(3), n_heads=2), Attention.Config.tiny()), TASK.build()
    found = attended(model, task, streams, n_samples=4)
    assert [each["layer"] for each in found.details["layers"]] == ["layers.0.attention", "layers.1"]
    assert [each["patterns"] for each in found.details["layers"]] == [["lsh", "key-selection"], ["window"]]

    batch = task.batch(streams("attended-shares"), 4, size=(3, 3), split="test")
    x = model.backbone.norms[0](model.embedding(torch.from_numpy(batch.tokens)))
    inner: list[torch.Tensor] = []
    layer = cast(HAX, model.backbone.layers[0])
    handle = layer.attention.register_forward_hook(lambda _m, args, _y: inner.append(args[0]))
    layer(x)
    handle.remove()
    inputs = layer.attention.attention_inputs(inner[0])
    masks = [
        key_sets_reference(inputs.q_BLHN, (p,), score_BLH=inputs.score_BLH, buckets=inputs.buckets)
        for p in inputs.patterns
    ]
    hits, keys, mass, n = 0.0, 0.0, 0.0, 0
    told = task.told_at(batch)
    assert told is not None
    weights = attention_weights(inputs, masks[0] | masks[1])
    for b, i in zip(*np.nonzero(batch.mask), strict=True):
        for h in range(2):
            p = int(told[b, i])
            hits += bool(masks[0][b, h, i, p])
            keys += bool(masks[1][b, h, i, p - 1])
            mass += float(weights[b, h, i, p])
            n += 1
    shares = found.details["layers"][0]["shares"]
    assert shares["lsh"]["admitted"] == pytest.approx(hits / n)
    assert shares["key-selection"]["key_admitted"] == pytest.approx(keys / n)
    assert shares["any"]["weight"] == pytest.approx(mass / n, abs=1e-5)
    assert 0 < shares["any"]["admitted"] < 1

    tokens, queries = found.arrays["attended_tokens"], found.arrays["attended_queries"]
    drawn = task.batch(streams("attended-drawn"), 1, size=(3, 3), split="test")
    assert (tokens == drawn.tokens[0]).all()
    assert (queries == np.flatnonzero(drawn.mask[0])).all()
    weights_0, kinds_0 = found.arrays["attended_weights_0"], found.arrays["attended_kinds_0"]
    assert weights_0.shape == kinds_0.shape == (9, len(tokens))
    assert (weights_0.dtype, kinds_0.dtype) == (np.float16, np.uint8)
    np.testing.assert_allclose(found.arrays["attended_weights_1"].astype(float).sum(1), 1, atol=2e-3)
    assert (kinds_0[weights_0 > 0] > 0).all()
    assert kinds_0.max() == 3
    labels = found.arrays["attended_labels"]
    assert {"A", "B", "C", "a", "b", "c", "|"} <= set(labels)
    assert (tokens[found.arrays["attended_needed"]] == drawn.labels[0, queries]).all()


def test_nothing_stays_on_the_model_and_scores_are_the_same() -> None:
    config = RecallConfig(TASK, Backbone.Config(8, (hax(Full()),)), valid_samples=4, test_samples=4)
    problem = config.build()
    torch.manual_seed(0)
    model = problem.build_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = problem.evaluate(model, Streams(0), final=True)
        again = problem.evaluate(model, Streams(0), final=True)
    assert first.metrics == again.metrics
    assert first.details == again.details
    assert all(not module._forward_hooks for module in model.modules())  # pyright: ignore[reportPrivateUsage]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.details["attended"]["layers"][0]["shares"]["full"]["admitted"] == 1.0
    assert first.details["blind"] == "key-majority"
    assert not problem.evaluate(model, Streams(0), final=False).arrays


def test_hooks_are_removed_even_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(SparseAttention.Config(8, d_key=4, patterns=(Window(2), Sink(1))))

    def broken(self: nn.Module, *args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(LanguageModel, "hidden", broken)
    with pytest.raises(RuntimeError, match="broken"):
        attended(model, TASK.build(), streams)
    assert all(not module._forward_hooks for module in model.modules())  # pyright: ignore[reportPrivateUsage]


def test_models_without_attention_and_tasks_without_places() -> None:
    empty = attended(model_of(Mamba2.Config.tiny()), TASK.build(), streams)
    assert (empty.details, empty.arrays) == ({}, {})

    class Anywhere(JointRecall):
        def told_at(self, batch: TokenBatch) -> Ints | None:
            return Task.told_at(self, batch)

    found = attended(model_of(Attention.Config.tiny()), Anywhere(TASK), streams)
    assert found.details["layers"][0]["shares"] == {}
    assert (found.arrays["attended_needed"] == -1).all()


def test_a_large_grid_is_drawn_small() -> None:
    torch.manual_seed(0)
    task = JointRecall()
    layers = (hax(Lsh(4, n_bits=2), KeySelection(4)),)
    model = LanguageModel(LanguageModel.Config(task.vocab_size, Backbone.Config(8, layers))).eval()
    found = attended(model, task, streams, n_samples=1)
    assert found.details["size"] == [16, 16]
    assert found.details["drawn"] == [5, 5]
    assert len(found.arrays["attended_tokens"]) == 111
