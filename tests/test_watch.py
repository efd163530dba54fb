"""Losses that are not finite, found after the fact: what a GPU run does, here on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asked import Asked
from recollect.core.errors import RunError
from recollect.core.seeding import Streams
from recollect.train import checkpoint as ckpt
from recollect.train.batches import digest
from recollect.train.loop import StoppedError, train
from recollect.train.metrics import read_metrics
from recollect.train.watch import FiniteWatch
from toy_problem import Toy, ToyConfig, toy_run


@pytest.fixture
def _deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.train.watch.EACH_STEP", False)


def test_the_first_bad_step_is_kept() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    one, nan, inf = torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(torch.inf)
    watch.note(1, one, one)
    assert watch.first_bad() is None
    watch.note(2, one, inf)
    watch.note(3, nan, nan)
    watch.note(4, one, one)
    assert watch.first_bad() == (2, 1.0, torch.inf)


@pytest.mark.usefixtures("_deferred")
@pytest.mark.parametrize("due", ["log_every", "eval_every", "checkpoint_every"])
@pytest.mark.parametrize(
    ("problem", "what"), [("nan_at", "loss is nan"), ("bad_gradient_at", "gradient norm is (nan|inf)")]
)
def test_a_bad_step_is_named_before_anything_is_written(tmp_path: Path, due: str, problem: str, what: str) -> None:
    never = {"log_every": 99, "eval_every": 0, "checkpoint_every": 99}
    run = toy_run(problem=ToyConfig(**{problem: 20}), **{**never, due: 8})
    with pytest.raises(RunError, match=what) as caught:
        train(run, tmp_path)
    batch = Toy(run.problem).batch(20, Streams(run.seed), torch.device("cpu"))
    assert "at step 20 " in str(caught.value)
    assert digest(batch) in str(caught.value)
    assert (tmp_path / "bad_batch-00000020.safetensors").exists()
    assert all(record["step"] <= 16 for record in read_metrics(tmp_path / "metrics.jsonl"))
    kept = ckpt.stems(tmp_path / "checkpoints") + ckpt.stems(tmp_path / "checkpoints", "best")
    assert {ckpt.step_of(stem) for stem in kept} <= {8, 16}
    for stem in kept:
        assert all(t.isfinite().all() for t in ckpt.load(tmp_path / "checkpoints", stem).tensors.values())


@pytest.mark.usefixtures("_deferred")
def test_a_stop_right_after_a_bad_step_writes_no_checkpoint_of_it(tmp_path: Path) -> None:
    run = toy_run(problem=ToyConfig(nan_at=3), log_every=99)
    steps = iter(range(1, 99))
    with pytest.raises(RunError, match="loss is nan at step 3") as caught:
        train(run, tmp_path, stop=lambda: next(steps) == 4)
    assert not isinstance(caught.value, StoppedError)
    assert ckpt.stems(tmp_path / "checkpoints") == []


def test_when_it_looks_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy_run(), tmp_path / "each")
    monkeypatch.setattr("recollect.train.watch.EACH_STEP", False)
    train(toy_run(), tmp_path / "seldom")
    a, b = (ckpt.load(tmp_path / name / "checkpoints", "step-00000030").tensors for name in ("each", "seldom"))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Quiet(Toy):
    """A loss that reads no number itself."""

    def loss(
        self, model: torch.nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        del generator
        error = model(batch["x"]).square().mean()
        return error, {"error": error.detach()}


@pytest.mark.usefixtures("_deferred")
def test_steps_that_write_nothing_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyConfig, "build", lambda config: Quiet(config))  # noqa: PLW0108 a class would not be bound
    counts: list[int] = []
    with Asked() as asked:

        def stop() -> bool:
            counts.append(len(asked.names))
            return False

        train(toy_run(log_every=10, eval_every=0, checkpoint_every=99), tmp_path, stop=stop)
    new = [after - before for before, after in zip([counts[0], *counts], counts, strict=False)]
    assert all(n == 0 for step, n in enumerate(new, 1) if step % 10), new
    assert new[9] > 0
