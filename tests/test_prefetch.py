"""Batches made ahead by worker processes: the same bits, and nothing left behind however a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.ahead import portable
from recollect.core.errors import ConfigError, DataError, RunError
from recollect.core.seeding import Streams
from recollect.train import checkpoint as ckpt
from recollect.train.batches import to_device
from recollect.train.loop import StoppedError, train
from recollect.train.metrics import read_metrics
from recollect.train.prefetch import _packed, _unpacked, batches, check_workers
from recollect.train.run import RunConfig
from toy_problem import Toy, ToyConfig, toy_run

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OddConfig(ToyConfig, kind="odd-toy"):
    """Makes trouble at one step, in the process that makes its batch."""

    at: int = 5
    how: str = "fine"

    def build(self) -> Odd:
        return Odd(self)


class Part(NamedTuple):
    rows: Tensor
    name: str


class Odd(Toy):
    config: OddConfig

    def batch(self, step: int, streams: Streams, device: torch.device) -> dict[str, Any]:
        c = self.config
        if step == c.at and c.how == "raise":
            raise DataError("episode 7 is damaged; delete the store")
        if step == c.at and c.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        batch = super().batch(step, streams, device)
        facts = torch.tensor([torch.get_num_threads(), os.getpid(), int(os.environ["OMP_NUM_THREADS"])])
        # A view that is not contiguous, a tree, a scalar, an empty tensor and half precision.
        parts = [Part(batch["x"].T, "x"), (batch["x"].bfloat16(), torch.zeros(0, 3), np.arange(step))]
        return {**batch, "parts": parts, "facts": facts}


def odd_run(how: str = "fine", **train: Any) -> RunConfig:
    return toy_run(problem=OddConfig(how=how), **{"eval_every": 0, "checkpoint_every": 4, **train})


def tensors(directory: Path, step: int) -> dict[str, Tensor]:
    return ckpt.load(directory / "checkpoints", ckpt.stem_of(step)).tensors


def test_the_same_bits_also_when_resumed_with_another_number(tmp_path: Path) -> None:
    train(toy_run(steps=12), tmp_path / "here")
    steps = iter(range(1, 99))
    with pytest.raises(StoppedError):
        train(toy_run(steps=12), tmp_path / "ahead", data_workers=1, stop=lambda: next(steps) == 5)
    assert active_children() == []
    train(toy_run(steps=12), tmp_path / "ahead", data_workers=2)
    assert active_children() == []
    here, ahead = (tensors(tmp_path / name, 12) for name in ("here", "ahead"))
    assert here.keys() == ahead.keys()
    assert all(torch.equal(here[name], ahead[name]) for name in here)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("here", "ahead")
    ]
    assert losses[0] == losses[1]


def test_batches_come_as_they_are_made_and_workers_compute_with_one_thread() -> None:
    run = odd_run(steps=4)
    problem = run.problem.build()
    with batches(run, problem, 2, CPU, 1) as take:
        (worker,) = active_children()
        came = [take(step) for step in (2, 3, 4)]
        assert [int(n) for n in came[0]["facts"]] == [1, worker.pid, 1]
    assert active_children() == []
    for step, batch in zip((2, 3, 4), came, strict=True):
        own = to_device(problem.batch(step, Streams(run.seed), CPU), CPU)
        assert torch.equal(batch["x"], own["x"])
        assert batch["scale"].shape == own["scale"].shape == ()
        part, (half, empty, array) = batch["parts"]
        assert isinstance(part, Part)
        assert part.name == "x"
        assert torch.equal(part.rows, own["parts"][0].rows)
        assert part.rows.stride() == own["parts"][0].rows.stride()
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, own["parts"][1][0])
        assert empty.shape == (0, 3)
        assert np.array_equal(array, np.arange(step))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raise", DataError, "^episode 7 is damaged; delete the store$"),
        ("die", RunError, "batch of step 5 was killed by signal SIGKILL.*--data-workers 0"),
    ],
)
def test_what_goes_wrong_in_a_worker_ends_the_run(
    tmp_path: Path, how: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(odd_run(how), tmp_path, data_workers=1)
    assert "\n" not in str(caught.value)
    assert how == "die" or "in batch" in str(caught.value.__cause__), "the worker's own traceback is shown"
    assert active_children() == []
    assert ckpt.stems(tmp_path / "checkpoints") == ["step-00000004"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_to_the_whole_group(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM, as a job manager sends it: a checkpoint, exit code 130, one line. SIGKILL of the run: no orphans."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "TOY_PAUSE_S": "0.05"}
    command = [sys.executable, "-m", "recollect", "train", "toy_problem:faceoff", "--row", "good"]
    command += ["--out", str(tmp_path), "--data-workers", "1", "train.steps=5000"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    deadline = time.monotonic() + 60
    while not read_metrics(tmp_path / "metrics.jsonl"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number is signal.SIGTERM:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, said = process.communicate(timeout=60)
    if number is signal.SIGTERM:
        assert process.returncode == 130
        assert said.count("\n") == 1, said
        assert "the same command resumes there" in said
        assert ckpt.stems(tmp_path / "checkpoints")
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("processes of the run's group are left")


def test_tensors_survive_packing() -> None:
    for tensor in (torch.arange(6).view(2, 3).T, torch.tensor(True), torch.zeros(2, 0), torch.tensor([1j])):
        back = _unpacked(_packed(tensor))
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_an_error_that_cannot_travel_keeps_its_words() -> None:
    class LocalError(Exception):
        pass

    assert str(portable(LocalError("here"))) == "LocalError: here"
    assert type(portable(DataError("there"))) is DataError


def test_a_negative_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not be negative, got -1"):
        train(toy_run(), tmp_path / "run", data_workers=-1)
    assert not (tmp_path / "run").exists()
    check_workers(0)
