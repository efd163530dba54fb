"""The loop: resumption to the bit, checkpoints that notice damage, and every way a run can go wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recollect.core.config import dumps, fingerprint, from_dict
from recollect.core.errors import ConfigError, RecollectError, RunError
from recollect.core.seeding import Streams
from recollect.train import checkpoint as ckpt
from recollect.train.batches import digest
from recollect.train.directory import RunDirectory, load_run
from recollect.train.loop import StoppedError, build_optimizer, evaluate_run, learning_rate, load_trained, train
from recollect.train.metrics import read_metrics
from recollect.train.run import FaceOff, RunConfig, TrainConfig
from recollect.train.runtime import ALLOCATOR_ENV, allocator_env, git_state, resolve_device
from toy_problem import Toy, ToyConfig, faceoff, toy_run

CLOCKS = {"steps_per_s", "elapsed_s"}


def final_tensors(directory: Path) -> dict[str, torch.Tensor]:
    folder = directory / "checkpoints"
    return ckpt.load(folder, ckpt.stems(folder)[-1]).tensors


def log_without_clocks(directory: Path) -> list[dict[str, Any]]:
    records = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert log_without_clocks(one) == log_without_clocks(other)
    results = [json.loads((directory / "results.json").read_text()) for directory in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]


def stop_at(step: int) -> Any:
    """A question asked once per step, which says yes the ``step``-th time."""
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count >= step

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing interrupted. Read only."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(toy_run(), directory)
    return directory


def test_a_run_learns_and_leaves_its_record(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    losses = [record["loss"] for record in read_metrics(whole / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert results["fingerprint"] == fingerprint(toy_run())
    assert (results["recipe"], results["group"], results["row"], results["seed"]) == (
        "toy_problem:faceoff",
        "recall",
        "good",
        0,
    )
    assert results["params"] == 4 * 8 + 8 + 8 + 1
    assert results["steps"] == 30
    assert results["metrics"]["undefined"] is None, "JSON has no NaN"
    assert results["details"] == {"final": True}
    assert np.load(whole / "arrays.npz")["y"].shape == (64,)
    assert load_run(whole) == toy_run()
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["threads"] == torch.get_num_threads()
    assert environment["earlier"] == []
    scored = [(r["step"], r["split"]) for r in read_metrics(whole / "metrics.jsonl") if "eval" in r]
    assert scored == [(8, "valid"), (16, "valid"), (24, "valid"), (30, "valid"), (30, "test")]
    assert len(ckpt.stems(whole / "checkpoints")) == toy_run().train.keep_checkpoints


def test_the_seed_decides_everything_and_the_callers_generator_nothing(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(toy_run(), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before), "the caller's global generator was moved"
    assert_same_run(whole, tmp_path / "again")
    train(toy_run(seed=1), tmp_path / "other")
    other = final_tensors(tmp_path / "other")
    assert not torch.equal(other["model.0.weight"], final_tensors(whole)["model.0.weight"])


@pytest.mark.parametrize("step", [1, 7, 8, 13, 29])
def test_a_stopped_run_resumes_to_the_bit(whole: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(StoppedError, match=f"step {step} "):
        train(toy_run(), tmp_path / "run", stop=stop_at(step))
    assert not (tmp_path / "run/results.json").exists()
    train(toy_run(), tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["earlier"]) == 1


def test_a_killed_process_resumes_to_the_bit(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recollect", "train", "toy_problem:faceoff", "--row", "good"]
    command += ["--out", str(directory)]
    process = subprocess.Popen(command, env={**environment, "TOY_PAUSE_S": "0.05"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(record["step"] >= 12 for record in read_metrics(directory / "metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(record["step"] for record in read_metrics(directory / "metrics.jsonl"))
    assert 12 <= reached < 30
    assert ckpt.stems(directory / "checkpoints")
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert "finished after 30 steps" in done.stdout
    assert_same_run(whole, directory)
    recorded = json.loads((directory / "environment.json").read_text())
    assert recorded["command"].startswith("recollect train toy_problem:faceoff --row good")
    if allocator_env({}):
        assert all(recorded["allocator"].values()), (
            "the command line did not restart itself under the allocator settings"
        )


def test_a_finished_run_is_not_run_again(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()

    def never(_record: dict[str, Any]) -> None:
        raise AssertionError("it ran")

    assert train(toy_run(), whole, progress=never)["steps"] == 30
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_keys_that_differ(whole: Path) -> None:
    with pytest.raises(RunError, match=r"train.lr: 0.01 -> 0.02.*choose another --out") as caught:
        train(toy_run(lr=0.02), whole)
    assert "train.steps" not in str(caught.value)


def test_a_truncated_checkpoint_says_what_to_delete_and_then_resumes(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(toy_run(), directory, stop=stop_at(16))
    latest = directory / "checkpoints/step-00000016.safetensors"
    latest.write_bytes(latest.read_bytes()[:-10])
    with pytest.raises(
        RunError, match=r"damaged \(it has .*delete .*step-00000016.json.*from the checkpoint of step 14"
    ):
        train(toy_run(), directory)
    latest.with_suffix(".json").unlink()
    train(toy_run(), directory)
    assert_same_run(whole, directory)


@pytest.mark.parametrize("harm", ["flip", "json", "gone"])
def test_other_damage_is_noticed_too(tmp_path: Path, harm: str) -> None:
    with pytest.raises(StoppedError):
        train(toy_run(), tmp_path, stop=stop_at(3))
    tensors = tmp_path / "checkpoints/step-00000003.safetensors"
    if harm == "flip":
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 1
        tensors.write_bytes(data)
    elif harm == "json":
        tensors.with_suffix(".json").write_text('{"step": 3, "by')
    else:
        tensors.unlink()
    with pytest.raises(RunError, match=r"damaged.*resume from the beginning"):
        train(toy_run(), tmp_path)


def test_leftovers_of_a_kill_while_saving_do_no_harm(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train(toy_run(), tmp_path, stop=stop_at(8))
    (tmp_path / "checkpoints/step-00000011.safetensors").write_bytes(b"half a fi")
    (tmp_path / "checkpoints/step-00000012.safetensors.partial").write_bytes(b"half a fi")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    train(toy_run(), tmp_path)
    assert_same_run(whole, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*11*")) + list(tmp_path.glob("checkpoints/*.partial"))


@pytest.mark.parametrize(
    ("problem", "what"), [("nan_at", "loss is nan"), ("bad_gradient_at", "gradient norm is (nan|inf)")]
)
def test_a_loss_that_is_not_finite_stops_with_the_batch_named(tmp_path: Path, problem: str, what: str) -> None:
    run = toy_run(problem=ToyConfig(**{problem: 20}))
    with pytest.raises(RunError, match=what) as caught:
        train(run, tmp_path)
    batch = Toy(run.problem).batch(20, Streams(run.seed), torch.device("cpu"))
    assert "step 20 " in str(caught.value)
    assert digest(batch) in str(caught.value)
    assert "checkpoint of step 14 is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = load_file(tmp_path / "bad_batch-00000020.safetensors")
    assert torch.equal(saved["x"].nan_to_num(7.0), batch["x"].nan_to_num(7.0))
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path).values())
    assert not (tmp_path / "results.json").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    where = RunDirectory(tmp_path)
    where.claim(toy_run())
    with where.lock(), pytest.raises(RunError, match="another process is training"):
        train(toy_run(), tmp_path)
    train(toy_run(), tmp_path)


def test_a_run_that_cannot_begin_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(problem: Toy) -> nn.Module:
        raise ConfigError("what it learns from is not there")

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "build_model", missing)
        with pytest.raises(ConfigError, match="is not there"):
            train(toy_run(), tmp_path / "new")
        assert not (tmp_path / "new").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("kept")
        with pytest.raises(ConfigError, match="is not there"):
            train(toy_run(), tmp_path / "mine")
        assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"
    with pytest.raises(StoppedError):
        train(toy_run(), tmp_path / "begun", stop=stop_at(3))
    monkeypatch.setattr(Toy, "build_model", missing)
    with pytest.raises(ConfigError, match="is not there"):
        train(toy_run(), tmp_path / "begun")
    assert RunDirectory(tmp_path / "begun").checkpoints.exists()


def test_a_directory_with_checkpoints_and_no_config_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train(toy_run(), tmp_path, stop=stop_at(3))
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match=r"no config\.json"):
        train(toy_run(), tmp_path)


def test_the_time_limit_ends_a_run_and_scores_it(tmp_path: Path) -> None:
    results = train(toy_run(time_limit_s=1e-9), tmp_path)
    assert results["steps"] == 1
    assert math.isfinite(results["metrics"]["error"])
    assert ckpt.stems(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_limit_that_passes_in_the_middle_of_a_step_still_saves_what_it_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock runs on with every look at it, so the limit is passed between any two of them."""
    for limit in range(20, 30):
        ticks = itertools.count()
        monkeypatch.setattr("recollect.train.loop.time.monotonic", lambda ticks=ticks: float(next(ticks)))
        results = train(toy_run(time_limit_s=float(limit)), tmp_path / str(limit))
        assert 1 < results["steps"] < 30
        assert ckpt.stems(tmp_path / str(limit) / "checkpoints")[-1] == ckpt.stem_of(results["steps"])
        assert read_metrics(tmp_path / str(limit) / "metrics.jsonl")[-2]["step"] == results["steps"]


def test_scores_come_from_the_average_of_the_parameters(whole: Path) -> None:
    saved = final_tensors(whole)
    _, problem, model = load_trained(whole)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"ema.{name}"])
        assert not torch.equal(parameter, saved[f"model.{name}"])
    assert problem.headline == "error"
    scored = evaluate_run(whole).metrics["error"]
    assert scored == json.loads((whole / "results.json").read_text())["metrics"]["error"]


def test_the_average_follows_its_equation(tmp_path: Path) -> None:
    """Two steps without evaluation: average = d (d p0 + (1 - d) p1) + (1 - d) p2."""
    settings: dict[str, Any] = {"ema": 0.9, "eval_every": 0, "checkpoint_every": 1, "keep_checkpoints": 9}
    train(toy_run(steps=2, **settings), tmp_path)
    p1, p2 = (ckpt.load(tmp_path / "checkpoints", ckpt.stem_of(n)).part("model")["0.weight"] for n in (1, 2))
    averages = [ckpt.load(tmp_path / "checkpoints", ckpt.stem_of(n)).part("ema")["0.weight"] for n in (1, 2)]
    torch.testing.assert_close(averages[1], 0.9 * averages[0] + 0.1 * p2)
    assert (averages[0] - p1).abs().max() > 0


def test_no_best_checkpoint_without_evaluations(tmp_path: Path) -> None:
    train(toy_run(steps=2, eval_every=0), tmp_path)
    with pytest.raises(RunError, match="leave out --best"):
        load_trained(tmp_path, best=True)


def test_autocast_reaches_the_loss(tmp_path: Path) -> None:
    train(toy_run(steps=1, autocast="bf16"), tmp_path / "bf16")
    train(toy_run(steps=1), tmp_path / "off")
    assert read_metrics(tmp_path / "bf16/metrics.jsonl")[0]["autocast"] == 1.0
    assert read_metrics(tmp_path / "off/metrics.jsonl")[0]["autocast"] == 0.0


def test_the_rate_warms_up_and_follows_the_cosine() -> None:
    config = TrainConfig(steps=110, lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(config, 1) == pytest.approx(0.2)
    assert learning_rate(config, 5) == pytest.approx(1.0)
    assert learning_rate(config, 10) == pytest.approx(2.0)
    assert learning_rate(config, 60) == pytest.approx(2.0 * 0.55)
    assert learning_rate(config, 110) == pytest.approx(0.2)
    assert learning_rate(TrainConfig(steps=110, lr=2.0, schedule="constant"), 100) == 2.0
    assert learning_rate(TrainConfig(steps=1, lr=2.0, warmup_steps=0), 1) == pytest.approx(0.2)


def test_decay_spares_vectors_and_marked_parameters_and_scales_reach_the_rate() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight._no_weight_decay = True
    model[1].weight._lr_scale = 0.1
    groups = build_optimizer(model, TrainConfig(steps=1, weight_decay=0.5)).param_groups
    found = {id(p): (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    expected = {"0.weight": (0.0, 1.0), "0.bias": (0.0, 1.0), "1.weight": (0.5, 0.1), "1.bias": (0.0, 1.0)}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "train.steps must be at least 1"),
        ({"lr": -1.0}, "train.lr"),
        ({"lr": math.nan}, "train.lr"),
        ({"ema": 1.0}, "train.ema"),
        ({"betas": (0.9, 1.0)}, "train.betas.1"),
        ({"clip": -1.0}, "train.clip"),
        ({"min_lr_ratio": 2.0}, "train.min_lr_ratio"),
        ({"time_limit_s": 0.0}, "train.time_limit_s"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"steps": 10, **settings})


def test_a_faceoff_names_rows_once_and_picks_them() -> None:
    runs = faceoff().runs
    with pytest.raises(ConfigError, match=r"'good'.*more than once"):
        FaceOff("twice", "", (*runs, runs[0]))
    with pytest.raises(ConfigError, match="distinct seeds"):
        FaceOff("seeds", "", runs, (0, 0))
    with pytest.raises(ConfigError, match="no row 'god'; did you mean 'good'"):
        faceoff().pick("god")
    assert faceoff().pick("good", "recall").row == "good"
    both = FaceOff("both", "", (runs[0], RunConfig(**{**vars(runs[0]), "group": "world"})))
    with pytest.raises(ConfigError, match="--group recall or --group world"):
        both.pick("good")
    changed = faceoff().overridden(["train.steps=3"], seeds=(4, 5))
    assert [run.seed for run in changed.expanded()] == [4, 4, 4, 5, 5, 5]
    assert {run.train.steps for run in changed.expanded()} == {3}


def test_a_config_survives_its_json() -> None:
    """Also the field whose declared type is the abstract base: its kind finds the class again."""
    assert from_dict(RunConfig, json.loads(dumps(toy_run()))) == toy_run()
    assert from_dict(FaceOff, json.loads(dumps(faceoff()))) == faceoff()


def test_allocator_settings_leave_the_users_own_alone() -> None:
    if not allocator_env({}):
        pytest.skip("this system has no glibc")
    assert allocator_env({}) == dict(ALLOCATOR_ENV)
    assert "MALLOC_TOP_PAD_" not in allocator_env({"MALLOC_TOP_PAD_": "1"})
    assert allocator_env({"LD_PRELOAD": "libjemalloc.so"}) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(RecollectError, match=r"'cuda' was asked for but .*; use --device cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta"])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(RecollectError, match=f"'{name}'.*use cpu or cuda"):
        resolve_device(name)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_of_the_checkout_that_tracks_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert git_state(tmp_path) == {"commit": None, "diff": None}, "not tracked: some other project's repository"
    git("add", "__init__.py")
    git("commit", "-m", "one")
    clean = git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"] or "")
    assert clean["diff"] is None
    (tmp_path / "__init__.py").write_text("x = 2\n")
    dirty = git_state(tmp_path)
    assert dirty["commit"] == f"{clean['commit']}-dirty"
    assert "+x = 2" in (dirty["diff"] or "")
