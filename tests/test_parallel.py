"""Runs of several processes, in parts and with recomputed layers: the same curve, and one line when something breaks.

Run as a script, this file is one process of such a run: ``test_parallel.py FOLDER SCENE ...`` under torchrun's
variables.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError, DataError, RecollectError, RunError
from recollect.core.layer import LayerConfig
from recollect.core.seeding import Streams
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import KeySelection, Lsh
from recollect.tasks import JointRecall
from recollect.train import checkpoint as ckpt
from recollect.train.gradients import gradients
from recollect.train.loop import StoppedError, load_trained, train
from recollect.train.metrics import read_metrics
from recollect.train.parallel.model import SharedModel
from recollect.train.parallel.team import Team
from recollect.train.problem import Share
from recollect.train.recall import RecallConfig
from recollect.train.recompute import recompute_layers
from recollect.train.run import RunConfig, TrainConfig
from recollect.train.shares import Cut, share_rows
from recollect.train.stopping import is_told
from toy_problem import Toy, ToyConfig

STEPS = 6
MAMBA2 = Mamba2.Config(8, d_state=4, d_head=4)
HAX_LAYER = HAX.Config(8, mixer=MAMBA2, patterns=(Lsh(4, n_bits=2), KeySelection(4)), d_key=4, explore=16)


@dataclass(frozen=True)
class FirmConfig(ToyConfig, kind="firm-toy"):
    """The toy without chance in its loss; trouble in one process alone."""

    dropout: float = 0.0
    batch_fails_in: int = -1
    loss_fails_in: int = -1

    def build(self) -> Firm:
        return Firm(self)


class Firm(Toy):
    config: FirmConfig

    def build_model(self) -> nn.Module:
        model = super().build_model()
        weight = model.get_parameter("0.weight")
        weight._lr_scale, weight._no_weight_decay = 0.1, True  # pyright: ignore[reportAttributeAccessIssue]
        return model

    def batch(self, step: int, streams: Streams, device: torch.device) -> dict[str, Tensor]:
        if step == 3 and self.config.batch_fails_in == int(os.environ.get("RANK", "0")):
            raise DataError("episode 7 is damaged; delete the store")
        batch = super().batch(step, streams, device)
        return {**batch, "x": batch["x"].flip(0)}  # what is wrong with the batch lies in the last process's rows

    def loss(self, model: nn.Module, batch: Any, generator: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        del generator
        if self.config.loss_fails_in == int(os.environ.get("RANK", "0")):
            raise RunError("this process has had enough; buy memory")
        x = batch["x"]
        return (model(x)[:, 0] - x.sum(1)).square().mean(), {"rows": float(len(x))}


def a_run(problem: Any, **settings: Any) -> RunConfig:
    known = {"steps": STEPS, "lr": 1e-2, "warmup_steps": 2, "ema": 0.9, "log_every": 1, "eval_every": 4}
    return RunConfig("test", "recall", "row", 0, problem, TrainConfig(**{**known, "checkpoint_every": 2, **settings}))


def recall(*layers: LayerConfig, batch_size: int = 4, batching: Any = "one-size", **settings: Any) -> RunConfig:
    task = JointRecall.Config(n_contexts=(2, 3), n_keys=(2, 3), n_values=7)
    problem = RecallConfig(
        task,
        Backbone.Config(8, layers=layers),
        batch_size=batch_size,
        batching=batching,
        valid_samples=1,
        test_samples=1,
        embedding_std=0.5,
    )
    return a_run(problem, **settings)


PADDED = partial(recall, MAMBA2, MAMBA2, batching="padded")
"""Rows of different sizes, so that the processes have different numbers of masked positions."""

EXPLORING = partial(recall, MAMBA2, HAX_LAYER)

CURVES: dict[str, tuple[RunConfig, dict[str, Any]]] = {
    "ddp-padded": (PADDED(), {"parallel": "ddp"}),
    "fsdp-padded": (PADDED(select="best"), {"parallel": "fsdp"}),
    "ddp-hax-parts": (EXPLORING(), {"parallel": "ddp", "accumulate": 2, "recompute": True}),
    "fsdp-hax-parts": (EXPLORING(), {"parallel": "fsdp", "accumulate": 2, "recompute": True}),
    "fsdp-marked": (a_run(FirmConfig(), weight_decay=1.0), {"parallel": "fsdp"}),
    "fsdp-bf16": (PADDED(autocast="bf16"), {"parallel": "fsdp"}),
}

FAILURES: dict[str, tuple[RunConfig, dict[str, Any]]] = {
    "uneven": (PADDED(batch_size=3), {"parallel": "fsdp"}),
    "batch-fails": (a_run(FirmConfig(batch_fails_in=1)), {"parallel": "ddp"}),
    "loss-fails": (a_run(FirmConfig(loss_fails_in=1)), {"parallel": "ddp"}),
    "nan": (a_run(FirmConfig(nan_at=5)), {"parallel": "fsdp"}),
    "redrawn": (
        recall(replace(HAX_LAYER, planes="redrawn")),
        {"parallel": "fsdp", "recompute": True},
    ),
}


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def losses_by_step(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record}


def asked(step: int, rank: int = 0) -> Any:
    """Says yes when asked the ``step``-th time, in one process alone."""
    questions = iter(range(1, 999))
    return lambda: next(questions) == step and int(os.environ.get("RANK", "0")) == rank


# --- One of several processes ------------------------------------------------------------------------------------


def process(folder: Path, scenes: list[str]) -> None:
    """Carry out some scenes, and write down how each ended in this process."""
    rank = os.environ["RANK"]
    for scene in scenes:
        name, _, step = scene.partition("@")
        run, how = {**CURVES, **FAILURES}[name]
        if step:
            run = replace(run, train=replace(run.train, steps=500))
            how = {**how, "progress": _slowly} if step == "kill" else {**how, "stop": asked(3, rank=1)}
        said: dict[str, Any] = {}
        try:
            said["metrics"] = train(run, folder / name, **how)["metrics"]
        except RecollectError as error:
            said = {"error": str(error), "told": is_told(error), "kind": type(error).__name__}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(said))


def _slowly(_: dict[str, Any]) -> None:
    time.sleep(0.1)


@contextmanager
def pair(folder: Path, *scenes: str) -> Generator[list[subprocess.Popen[str]]]:
    """Two processes; they have ended without an error of their own, or been killed, when the context has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(folder), *scenes]
    running = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield running
        for each in running:
            _, said = each.communicate(timeout=100)
            assert each.returncode in (0, -signal.SIGKILL), said
            assert not said, said
    finally:
        for each in running:
            each.kill()
            each.communicate()


def ended(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


# --- What they did -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pair of processes that carried out every scene, one after the other."""
    folder = tmp_path_factory.mktemp("pair")
    with pair(folder, *CURVES, *FAILURES):
        return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory in which one process carries out the same run."""
    found: dict[RunConfig, Path] = {}

    def directory(run: RunConfig) -> Path:
        if run not in found:
            found[run] = tmp_path_factory.mktemp("alone") / "run"
            train(run, found[run])
        return found[run]

    return directory


def assert_close_checkpoints(one: Path, other: Path, step: int, tolerance: float) -> None:
    a, b = (ckpt.load(path / "checkpoints", ckpt.stem_of(step)).tensors for path in (one, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if ".exp_avg" in name:  # moments of what is nearly zero; parameters show what they do
            continue
        torch.testing.assert_close(tensor, b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CURVES)
def test_processes_and_parts_give_the_curve_of_one(done: Path, alone: Any, name: str) -> None:
    run, _ = CURVES[name]
    single = alone(run)
    here, there = losses(single), losses(done / name)
    assert len(there) == STEPS
    bf16 = run.train.autocast == "bf16"
    assert there == pytest.approx(here, rel=1e-2 if bf16 else 1e-5)
    if bf16:
        assert there != pytest.approx(losses(alone(PADDED())), rel=1e-5), "it was computed in float32"
    assert len(set(here)) == STEPS, "a curve that stands still shows nothing"
    assert_close_checkpoints(single, done / name, STEPS, 1e-2 if bf16 else 1e-3)
    results = [json.loads((path / "results.json").read_text()) for path in (single, done / name)]
    assert ended(done, name)[0] == ended(done, name)[1]
    assert results[1]["params"] == results[0]["params"]
    assert results[1]["validation"]["step"] == results[0]["validation"]["step"]
    first = [read_metrics(path / "metrics.jsonl")[0] for path in (single, done / name)]
    for key in first[0].keys() & {"cross_entropy", "accuracy", "grad_norm", "filling"}:
        assert first[1][key] == pytest.approx(first[0][key], rel=1e-2 if bf16 else 1e-4), key
    environment = json.loads((done / name / "environment.json").read_text())
    assert environment["processes"] == 2


def test_shards_are_halves_and_any_number_of_processes_reads_them(done: Path) -> None:
    folder = done / "fsdp-padded/checkpoints"
    facts = ckpt.facts(folder, ckpt.stem_of(STEPS))
    assert [shard["file"] for shard in facts["shards"]] == [f"step-00000006.{rank}of2.safetensors" for rank in (0, 1)]
    held = [shard["tensors"] for shard in facts["shards"]]
    start, shape = held[1]["optim.embedding.weight.exp_avg"]
    assert 0 < start < shape[0]
    assert "model.embedding.weight" in held[0]
    stored = ckpt.Stored(folder, ckpt.stem_of(STEPS))
    whole = stored.read("model.embedding.weight")
    assert list(whole.shape) == shape
    for begin in range(shape[0]):
        for end in range(begin, shape[0] + 1):
            assert torch.equal(stored.read("model.embedding.weight", begin, end), whole[begin:end])
    assert isinstance(load_trained(done / "fsdp-padded")[2], LanguageModel)
    ddp = ckpt.facts(done / "ddp-padded/checkpoints", ckpt.stem_of(STEPS))
    assert "shards" not in ddp, "whole parameters are written as by one process"


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_noticed(done: Path, tmp_path: Path, harm: str) -> None:
    folder, stem = tmp_path, ckpt.stem_of(STEPS)
    for path in (done / "fsdp-padded/checkpoints").glob(f"{stem}*"):
        (folder / path.name).write_bytes(path.read_bytes())
    ckpt.load(folder, stem)
    shard = folder / f"{stem}.1of2.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    if harm == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if harm == "flip" else data[:-3])
    with pytest.raises(RunError, match=rf"damaged \(.*1of2.*delete .*{stem}\.json") as caught:
        ckpt.load(folder, stem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "teller", "kind", "message"),
    [
        ("uneven", 0, "ConfigError", "a batch of 3 rows cannot be shared equally by 2 parts"),
        ("batch-fails", 1, "DataError", "episode 7 is damaged; delete the store"),
        ("loss-fails", 1, "RunError", "this process has had enough; buy memory"),
        ("nan", 0, "RunError", "loss is nan at step 5 "),
        ("redrawn", 0, "ConfigError", "planes=redrawn would draw other hash planes"),
    ],
)
def test_what_goes_wrong_in_one_ends_all_and_is_told_once(
    done: Path, name: str, teller: int, kind: str, message: str
) -> None:
    both = ended(done, name)
    assert both[teller]["kind"] == kind
    assert message in both[teller]["error"]
    assert [said["told"] for said in both].count(False) == 1
    assert both[1 - teller]["told"]
    assert all("\n" not in said["error"] for said in both)
    assert not (done / name / "results.json").exists()
    assert bool(list((done / name).glob("bad_batch-00000005.*"))) == (name == "nan")


def test_killed_then_resumed_by_one_and_then_by_two(tmp_path: Path, alone: Any) -> None:
    run, _ = CURVES["fsdp-padded"]
    long = replace(run, train=replace(run.train, steps=500))
    directory = tmp_path / "fsdp-padded"
    deadline = time.monotonic() + 60
    with pair(tmp_path, "fsdp-padded@kill") as running:
        while not any(record["step"] >= 5 for record in read_metrics(directory / "metrics.jsonl")):
            assert all(each.poll() is None for each in running)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running[1].send_signal(signal.SIGKILL)
        running[0].wait(timeout=20)
    first = json.loads((tmp_path / "fsdp-padded.0.json").read_text())
    assert "another of the 2 processes of this run is gone" in first["error"]
    assert not first["told"]
    folder = directory / "checkpoints"
    step = ckpt.step_of(ckpt.stems(folder)[-1])
    assert step >= 4
    ckpt.load(folder, ckpt.stems(folder)[-1])
    single = tmp_path / "single"
    with pytest.raises(StoppedError):
        train(long, single, stop=asked(step + 6))
    with pytest.raises(StoppedError):
        train(long, directory, stop=asked(3))
    assert ckpt.step_of(ckpt.stems(folder)[-1]) == step + 3
    assert "shards" not in ckpt.facts(folder, ckpt.stem_of(step + 3))
    with pair(tmp_path, "fsdp-padded@resume"):
        pass
    kinds = [each["kind"] for each in ended(tmp_path, "fsdp-padded")]
    assert kinds == ["StoppedError"] * 2, "one asked, and both stopped after the same step"
    assert sorted(each["told"] for each in ended(tmp_path, "fsdp-padded")) == [False, True]
    assert losses_by_step(directory).keys() == set(range(1, step + 7))
    assert losses(directory) == pytest.approx(losses(single), rel=1e-4)


def test_processes_that_nobody_asked_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--parallel ddp needs .*torch\.distributed\.run --nproc-per-node 2"):
        train(PADDED(), tmp_path / "run", parallel="ddp")
    with pytest.raises(ConfigError, match="unknown way to share a run 'zero'"):
        train(PADDED(), tmp_path / "run", parallel="zero")  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"process 1 of 2 .*RANK is set.*add --parallel ddp") as caught:
        train(PADDED(), tmp_path / "run")
    assert is_told(caught.value), "the first process of the machine says it"
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError) as caught:
        train(PADDED(), tmp_path / "run")
    assert not is_told(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        ({"accumulate": 3}, "a batch of 4 rows cannot be shared equally by 3 parts"),
    ],
)
def test_parts_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(PADDED(), tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "parts", "workers"), [(PADDED(), 4, 1), (EXPLORING(), 2, 0)], ids=["padded-ahead", "hax"]
)
def test_accumulation_equals_the_whole_batch(
    tmp_path: Path, alone: Any, run: RunConfig, parts: int, workers: int
) -> None:
    train(run, tmp_path, accumulate=parts, data_workers=workers)
    assert losses(tmp_path) == pytest.approx(losses(alone(run)), rel=1e-5)
    assert_close_checkpoints(alone(run), tmp_path, STEPS, 1e-3)


def test_the_mean_is_over_all_masked_positions_also_where_a_part_has_none() -> None:
    problem = PADDED().problem.build()
    model = problem.build_model()
    whole = problem.batch(1, Streams(0), torch.device("cpu"))
    mask = whole.mask.clone()
    mask[0] = False
    whole = whole._replace(mask=mask)
    shared = SharedModel(Team(), problem, model, torch.device("cpu"))

    def gradient(cut: Cut) -> tuple[float, dict[str, Any], list[Tensor]]:
        model.zero_grad()
        loss, numbers = gradients(shared, cut(problem, whole), Streams(0), 1, False, "off")
        return float(loss), numbers, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    counts = [int(part.sum()) for part in mask]
    assert counts[0] == 0
    assert len(set(counts)) > 2, counts
    loss, numbers, grads = gradient(Cut())
    in_parts, their_numbers, their_grads = gradient(Cut(4, 0, 4))
    assert in_parts == pytest.approx(loss, rel=1e-6)
    assert float(their_numbers["accuracy"]) == pytest.approx(float(numbers["accuracy"]), rel=1e-6)
    for a, b in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_are_shared_in_order_and_the_rest_is_everybodys() -> None:
    batch = {"x": torch.arange(12).view(6, 2), "mask": np.arange(6) < 4, "scale": torch.tensor(2.0), "name": "n"}
    parts = share_rows(batch, 3)
    assert [part.batch["x"][:, 0].tolist() for part in parts] == [[0, 2], [4, 6], [8, 10]]
    assert [part.counted for part in parts] == [1.5, 1.5, 0.0]
    assert [(part.weight, part.number) for part in parts] == [(1 / 3, 0), (1 / 3, 1), (1 / 3, 2)]
    assert all(part.batch["scale"] is batch["scale"] and part.batch["name"] == "n" for part in parts)
    assert Cut(3, 1, 2)(Toy(ToyConfig()), batch)[0].batch["x"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ConfigError, match=r"first axis cannot be shared by rows \(x has 6, y has 5\)"):
        share_rows({"x": torch.zeros(6), "y": torch.zeros(5)}, 2)
    with pytest.raises(ConfigError, match="has no rows to share"):
        share_rows({"scale": torch.tensor(1.0)}, 2)


def test_recomputed_layers_give_the_same_bits_and_keep_less() -> None:
    """Explorers are drawn again as they were: the layer reads other keys otherwise."""
    problem = EXPLORING().problem.build()
    batch = problem.batch(1, Streams(0), torch.device("cpu"))

    def gradient(recomputed: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = problem.build_model().train()
        if recomputed:
            recompute_layers(problem.layers(model))
        shared = SharedModel(Team(), problem, model, torch.device("cpu"))
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients(shared, [Share(batch)], Streams(0), 1, False, "off")
        return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())

    plain, kept = gradient(False)
    again, kept_less = gradient(True)
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_less < 0.7 * kept


def test_recomputing_needs_layers_that_can_be_repeated(tmp_path: Path) -> None:
    layer = SparseAttention.Config(8, patterns=(Lsh(4, n_bits=2),), d_key=4, planes="redrawn")
    with pytest.raises(ConfigError, match=r"planes=redrawn.*or leave --recompute out"):
        train(recall(layer), tmp_path / "redrawn", recompute=True)
    with pytest.raises(ConfigError, match=r"this model has none; leave it out"):
        train(a_run(FirmConfig()), tmp_path / "toy", recompute=True)


@pytest.mark.slow
def test_torchrun_itself(tmp_path: Path, alone: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [*command, str(tmp_path), "fsdp-padded", "ddp-padded"],
        env=environment,
        capture_output=True,
        check=False,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    for name in ("fsdp-padded", "ddp-padded"):
        assert losses(tmp_path / name) == pytest.approx(losses(alone(CURVES[name][0])), rel=1e-5)
    assert "Warning" not in said.stderr, said.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(Path(sys.argv[1]), sys.argv[2:])
