"""A world model's training step asks its device for nothing: on a GPU, each answer waits for all work before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.core.seeding import Streams
from recollect.data.windows import unbroken
from recollect.envs.distracting_memory import DistractingMemory
from recollect.models.latent import LatentConfig
from recollect.models.presets import PRESETS, Size, preset
from recollect.models.world_model import Batch, WorldModel
from recollect.train.world import World, WorldConfig

aten = torch.ops.aten

ASKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
}
"""What gives the host a number, or a shape that only the numbers tell."""


class Asked(TorchDispatchMode):
    """Names of the operations by which the host learns of a tensor's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        if func in ASKS or masks:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


SIZE = Size(d_model=16, n_blocks=1, d_state=4, hidden=16, latent=LatentConfig(4, 4), window=8, n_keys=4, chunk=8)


def world(row: str, **options: Any) -> World:
    env = DistractingMemory.Config(11)
    config = WorldConfig(env, preset(row, SIZE), hidden=16, batch_size=2, n_episodes=4, n_valid=2, n_test=2, **options)
    return config.build()


def step(problem: World, change: Callable[[Batch], Batch] = lambda batch: batch) -> list[str]:
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
    """But for ``haxwm``, whose attention has another form on a GPU than here."""
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


def test_rows_that_begin_in_the_middle_are_not_whole() -> None:
    first = np.zeros((2, 5), dtype=np.bool_)
    first[:, 0] = True
    assert unbroken(first)
    first[0, 0] = False
    assert not unbroken(first)
    first[:, 0] = True
    first[1, 3] = True
    assert not unbroken(first)
