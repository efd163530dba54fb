"""A training step asks its device for nothing: on a GPU, each answer waits for all work before it.

Sparse attention has another form on a CPU, where this runs; its rows are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asked import Asked
from recollect.core.seeding import Streams
from recollect.data.windows import unbroken
from recollect.envs.distracting_memory import DistractingMemory
from recollect.hf import modeling
from recollect.models import language_model
from recollect.models.chunked_loss import masked_cross_entropy
from recollect.models.latent import LatentConfig
from recollect.models.presets import PRESETS, Size, preset
from recollect.models.world_model import WorldModel
from recollect.recipes import load_recipe
from recollect.train.problem import Problem
from recollect.train.recall import RecallConfig
from recollect.train.world import World, WorldConfig

SIZE = Size(d_model=16, n_blocks=1, d_state=4, hidden=16, latent=LatentConfig(4, 4), window=8, n_keys=4, chunk=8)


def world(row: str, **options: Any) -> World:
    env = DistractingMemory.Config(11)
    config = WorldConfig(env, preset(row, SIZE), hidden=16, batch_size=2, n_episodes=4, n_valid=2, n_test=2, **options)
    return config.build()


def step(problem: Problem, change: Callable[[Any], Any] = lambda batch: batch) -> list[str]:
    """What a step of training asks for."""
    torch.manual_seed(0)
    model, generator = problem.build_model(), torch.Generator().manual_seed(0)
    batch = change(problem.batch(1, Streams(0), torch.device("cpu")))
    with Asked() as asked:
        loss, _ = problem.loss(model, batch, generator)
        loss.backward()
    return asked.names


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU alone, codes are looked at."""
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
    monkeypatch.setattr(WorldModel, "_check", lambda *_: None)


@pytest.mark.parametrize("row", sorted(set(PRESETS) - {"haxwm"}))
def test_a_training_step_asks_for_nothing(row: str) -> None:
    assert step(world(row)) == []


@pytest.mark.parametrize("observation", ["tiles", "pixels"])
def test_nor_do_pictures(observation: str) -> None:
    assert step(world("s5wm", observation=observation, depth=4)) == []


def test_what_may_be_broken_is_asked() -> None:
    asked = step(world("s5wm"), lambda batch: batch._replace(unbroken=False))
    assert "aten._local_scalar_dense.default" in asked
    assert "aten.index.Tensor" in asked


def test_the_same_loss_either_way() -> None:
    problem = world("haxwm")
    torch.manual_seed(0)
    model = problem.build_model()
    batch = problem.batch(1, Streams(0), torch.device("cpu"))
    assert batch.unbroken
    losses = [
        problem.loss(model, batch._replace(unbroken=known), torch.Generator().manual_seed(0))[0]
        for known in (True, False)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("row", ["mamba", "mamba2", "mamba2+full", "gated_deltanet", "samba", "conv+attention"])
def test_nor_does_recall(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "masked_cross_entropy", partial(masked_cross_entropy, select=False))
    problem = load_recipe("recall-mini").pick(row, "recall").problem
    assert isinstance(problem, RecallConfig)
    assert step(replace(problem, batch_size=2).build()) == []


def test_nor_does_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "masked_cross_entropy", partial(masked_cross_entropy, select=False))
    assert step(load_recipe("language-smoke").pick("none", "language").problem.build()) == []


def test_rows_that_begin_in_the_middle_are_not_whole() -> None:
    first = np.zeros((2, 5), dtype=np.bool_)
    first[:, 0] = True
    assert unbroken(first)
    first[0, 0] = False
    assert not unbroken(first)
    first[:, 0] = True
    first[1, 3] = True
    assert not unbroken(first)
