"""What the frames of a world model's episode attend to, beside a computation by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recollect.core.layer import LayerConfig
from recollect.core.seeding import Streams
from recollect.envs import DistractingMemory
from recollect.eval import attended_frames as module
from recollect.eval.attended_frames import attended_frames
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.models.backbone import Backbone
from recollect.models.latent import LatentConfig
from recollect.models.rssm import RSSM
from recollect.models.s4wm import S4WM
from recollect.models.world_model import Batch, WorldModel
from recollect.ops.attention_map import attention_weights
from recollect.ops.patterns import KeySelection, Lsh
from recollect.ops.sparse_attention import key_sets_reference
from recollect.train.world import World, WorldConfig

LATENT = LatentConfig(groups=2, classes=4)
HAX_LAYER = HAX.Config(8, mixer=GRU.Config(8), patterns=(Lsh(4, n_bits=1), KeySelection(3)), d_key=4, n_heads=2)


@pytest.fixture(autouse=True)
def _data_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path_factory.getbasetemp() / "episodes"))


def dynamics(*layers: LayerConfig, chunk: int | None = None) -> S4WM.Config:
    return S4WM.Config(Backbone.Config(8, layers=layers), latent=LATENT, hidden=8, chunk=chunk)


def problem_of(config: Any) -> World:
    sizes = {"hidden": 8, "batch_size": 2, "n_episodes": 2, "n_valid": 2, "n_test": 3}
    return WorldConfig(DistractingMemory.Config(11), config, **sizes).build()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # pyright: ignore


def model_and_batch(config: Any) -> tuple[WorldModel, Batch]:
    problem = problem_of(config)
    torch.manual_seed(0)
    return problem.build_model().eval(), problem.batch(1, Streams(0), torch.device("cpu"))


@torch.no_grad()
def test_maps_are_the_weights_that_the_layer_computes_with() -> None:
    model, batch = model_and_batch(dynamics(GRU.Config(8), HAX_LAYER))
    found = attended_frames(model, batch, 21)
    assert found.details == {
        "length": 27,
        "context": 21,
        "layers": [{"layer": "layers.1.attention", "patterns": ["lsh", "key-selection"]}],
    }
    assert found.arrays["frames_queries"].tolist() == list(range(21, 28))
    assert found.arrays["frames_keys"].tolist() == list(range(28))
    maps = found.arrays["frames_weights_0"]
    assert (maps.shape, maps.dtype) == ((2, 6, 27), np.float16)

    inner: list[torch.Tensor] = []
    attention: Any = model.dynamics.backbone.layers[1].attention  # pyright: ignore
    handle = attention.register_forward_hook(lambda _m, args, _y: inner.append(args[0]))
    model.observe(batch.each(lambda part: part[:1]))
    handle.remove()
    inputs = attention.attention_inputs(inner[0])
    sets = [
        key_sets_reference(inputs.q_BLHN, (p,), score_BLH=inputs.score_BLH, buckets=inputs.buckets)
        for p in inputs.patterns
    ]
    weights = attention_weights(inputs, sets[0] | sets[1])
    for mask, stored in zip(sets, maps, strict=True):
        by_hand = (weights * mask)[0].mean(0)[21:].numpy()
        np.testing.assert_allclose(stored.astype(float), by_hand, atol=1e-3)
    assert (maps[:, np.arange(6), :][:, 0, 22:] == 0).all()  # nothing is read of the future
    assert maps.astype(float).sum((0, 2)).min() > 0.5


def test_chunks_of_training_do_not_cut_the_map() -> None:
    whole, batch = model_and_batch(dynamics(HAX_LAYER))
    cut, _ = model_and_batch(dynamics(HAX_LAYER, chunk=5))
    cut.load_state_dict(whole.state_dict())
    one, other = attended_frames(whole, batch, 21), attended_frames(cut, batch, 21)
    assert one.details == other.details
    np.testing.assert_allclose(
        one.arrays["frames_weights_0"].astype(float), other.arrays["frames_weights_0"].astype(float), atol=2e-3
    )


def test_long_episodes_are_binned_and_longer_ones_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch(dynamics(Attention.Config(8, n_heads=2, window=40)))
    fine = attended_frames(model, batch, 21).arrays["frames_weights_0"].astype(float)
    monkeypatch.setattr(module, "BINS", 3)
    coarse = attended_frames(model, batch, 21)
    assert coarse.arrays["frames_keys"].tolist() == [0, 9, 18, 27]
    assert coarse.arrays["frames_queries"].tolist() == [21, 23, 25, 27]
    by_hand = fine.reshape(1, 3, 2, 3, 9).sum(-1).mean(2)
    np.testing.assert_allclose(coarse.arrays["frames_weights_0"].astype(float), by_hand, atol=2e-3)
    np.testing.assert_allclose(by_hand.sum(-1), 1, atol=5e-3)
    monkeypatch.setattr(module, "MAX_FRAMES", 26)
    assert attended_frames(model, batch, 21).arrays == {}


@pytest.mark.parametrize("config", [dynamics(GRU.Config(8)), RSSM.Config(latent=LATENT, hidden=8, d_deter=8)])
def test_models_without_attention_have_no_maps(config: Any) -> None:
    model, batch = model_and_batch(config)
    found = attended_frames(model, batch, 21)
    assert (found.details, found.arrays) == ({}, {})


def test_a_final_evaluation_stores_maps_and_films_and_scores_as_before() -> None:
    problem = problem_of(dynamics(HAX_LAYER))
    torch.manual_seed(0)
    model = problem.build_model().eval()
    before = hooks(model)
    with torch.no_grad():
        scored = problem.evaluate(model, Streams(0), final=True)
        again = problem.evaluate(model, Streams(0), final=True)
        midway = problem.evaluate(model, Streams(0), final=False)
    assert scored.metrics == again.metrics
    assert hooks(model) == before
    assert scored.arrays["frames_weights_0"].shape == (2, 6, 27)
    assert scored.details["attended"]["context"] == 21
    assert scored.arrays["film_truth"].shape == scored.arrays["film_imagined"].shape == (2, 6, 40, 40, 3)
    assert scored.arrays["film_step"].tolist() == [21, 22, 23, 24, 25, 26]
    np.testing.assert_array_equal(scored.arrays["film_truth"], scored.arrays["strip_truth"][:2])
    assert midway.arrays == {}
    assert midway.details["attended"] is None
    plain = problem_of(replace(dynamics(GRU.Config(8))))
    assert "frames_keys" not in plain.evaluate(plain.build_model().eval(), Streams(0), final=True).arrays
