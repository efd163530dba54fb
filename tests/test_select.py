"""Which weights a run is tested with: the last ones or those of the best validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.core.config import override
from recollect.core.errors import ConfigError, RunError
from recollect.train import checkpoint as ckpt
from recollect.train.loop import StoppedError, evaluate_run, load_trained, train
from recollect.train.metrics import read_metrics
from recollect.train.run import RunConfig
from toy_problem import toy_run


def jumpy(**changes: Any) -> RunConfig:
    """A rate so high that the last validation is not the best one."""
    settings: dict[str, Any] = {
        "lr": 0.3,
        "schedule": "constant",
        "ema": 0.0,
        "steps": 42,
        "eval_every": 4,
        "clip": 0.0,
        "select": "best",
    }
    return toy_run(**{**settings, **changes})


def validations(directory: Path) -> dict[int, float]:
    records = read_metrics(directory / "metrics.jsonl")
    return {r["step"]: r["eval"]["error"] for r in records if r.get("split") == "valid"}


def results_of(directory: Path) -> dict[str, Any]:
    results = json.loads((directory / "results.json").read_text())
    return {key: results[key] for key in ("metrics", "details", "validation", "steps")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(jumpy(), directory)
    return directory


def test_the_best_validation_is_tested(whole: Path) -> None:
    scores = validations(whole)
    assert list(scores) == [*range(4, 42, 4), 42], "the last step is validated too"
    step, value = min(scores.items(), key=lambda item: item[1])
    assert step < 42, "this test needs a run whose last weights are not its best"
    results = results_of(whole)
    assert results["validation"] == {"step": step, "metric": "error", "value": value}
    # Validation and test are the same data here, so the weights show in the score.
    assert results["metrics"]["error"] == pytest.approx(value, rel=1e-6)
    assert results["steps"] == 42
    (kept,) = ckpt.stems(whole / "checkpoints", "best")
    assert ckpt.facts(whole / "checkpoints", kept)["step"] == step


def test_loading_takes_the_weights_that_were_tested(whole: Path) -> None:
    assert evaluate_run(whole).metrics["error"] == results_of(whole)["metrics"]["error"]
    last = evaluate_run(whole, best=False).metrics["error"]
    assert last == pytest.approx(validations(whole)[42], rel=1e-6)
    assert last != evaluate_run(whole, best=True).metrics["error"]


def test_the_last_weights_are_tested_by_default(tmp_path: Path) -> None:
    train(jumpy(select="last"), tmp_path)
    results, value = results_of(tmp_path), validations(tmp_path)[42]
    assert results["validation"] == {"step": 42, "metric": "error", "value": value}
    assert results["metrics"]["error"] == pytest.approx(value, rel=1e-6)
    assert evaluate_run(tmp_path).metrics["error"] == results["metrics"]["error"]
    assert evaluate_run(tmp_path, best=True).metrics["error"] < value


def test_the_last_step_may_be_the_best_and_is_validated_once(tmp_path: Path) -> None:
    train(toy_run(steps=16, eval_every=8, select="best"), tmp_path)
    assert list(validations(tmp_path)) == [8, 16]
    assert results_of(tmp_path)["validation"]["step"] == 16
    train(toy_run(steps=3, eval_every=8, select="best"), tmp_path / "short")
    assert list(validations(tmp_path / "short")) == [3]


def test_no_validation_is_null(tmp_path: Path) -> None:
    train(toy_run(steps=2, eval_every=0), tmp_path)
    assert results_of(tmp_path)["validation"] is None
    assert validations(tmp_path) == {}
    with pytest.raises(RunError, match="leave out --best"):
        load_trained(tmp_path, best=True)


@pytest.mark.parametrize("step", [3, 4, 8, 41])
def test_a_stopped_run_resumes_to_the_same_choice(whole: Path, tmp_path: Path, step: int) -> None:
    steps = iter(range(1, 99))
    with pytest.raises(StoppedError):
        train(jumpy(), tmp_path, stop=lambda: next(steps) >= step)
    train(jumpy(), tmp_path)
    assert results_of(tmp_path) == results_of(whole)
    assert validations(tmp_path) == validations(whole)


@pytest.mark.parametrize("select", ["best", "last"])
def test_a_run_killed_after_training_ends_with_the_same_results(tmp_path: Path, select: str) -> None:
    """Also when it was killed in the middle of writing them, and when a validation came after its last checkpoint."""
    train(jumpy(select=select), tmp_path)
    before = results_of(tmp_path)
    (tmp_path / "results.json").unlink()
    train(jumpy(select=select), tmp_path)
    assert results_of(tmp_path) == before
    # As if it had died before the last checkpoint: the best weights on disk may be of a later step than it resumes at.
    (tmp_path / "results.json").unlink()
    for path in (tmp_path / "checkpoints").glob("step-00000042.*"):
        path.unlink()
    train(jumpy(select=select), tmp_path)
    assert results_of(tmp_path) == before


def test_a_time_limit_that_passed_between_two_starts_still_validates_the_last_step(tmp_path: Path) -> None:
    run = jumpy(time_limit_s=1000.0)
    with pytest.raises(StoppedError):
        train(run, tmp_path, stop=lambda: True)
    (facts,) = (tmp_path / "checkpoints").glob("step-*.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "wall_s": 1001.0}))
    train(run, tmp_path)
    assert results_of(tmp_path)["steps"] == 1
    assert results_of(tmp_path)["validation"]["step"] == 1


def test_what_is_said_of_the_tested_weights_is_what_stands_beside_them(tmp_path: Path) -> None:
    """The best weights may be of a step after the last checkpoint, which a time limit then never reaches again."""
    run = jumpy(time_limit_s=1000.0)
    steps = iter(range(1, 99))
    with pytest.raises(StoppedError):
        train(run, tmp_path, stop=lambda: next(steps) == 6)
    folder = tmp_path / "checkpoints"
    early = ckpt.load(folder, "best-00000004")
    later = {"step": 8, "metric": "error", "value": 1e-9}
    ckpt.save(folder, "best-00000008", ckpt.Checkpoint(early.tensors, later))
    facts = folder / "step-00000006.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "wall_s": 1001.0}))
    train(run, tmp_path)
    assert results_of(tmp_path)["validation"] == later
    assert results_of(tmp_path)["steps"] == 6


def test_averaged_weights_are_what_is_kept(tmp_path: Path) -> None:
    run = jumpy(ema=0.5)
    train(run, tmp_path)
    facts = results_of(tmp_path)["validation"]
    assert facts["value"] == min(validations(tmp_path).values())
    assert results_of(tmp_path)["metrics"]["error"] == pytest.approx(facts["value"], rel=1e-6)
    _, _, model = load_trained(tmp_path)
    kept = ckpt.load(tmp_path / "checkpoints", ckpt.stem_of(facts["step"], "best")).part("model")
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_best_weights_that_are_gone_are_an_error_of_one_line(tmp_path: Path) -> None:
    train(jumpy(steps=8), tmp_path)
    (tmp_path / "results.json").unlink()
    (facts,) = (tmp_path / "checkpoints").glob("best-*.json")
    tensors = facts.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"best-.* is damaged.*delete .*best-.*json.*another --out"):
        train(jumpy(steps=8), tmp_path)
    facts.unlink()
    with pytest.raises(RunError, match="no weights of a best validation"):
        train(jumpy(steps=8), tmp_path)


def test_best_needs_validations() -> None:
    with pytest.raises(ConfigError, match=r"give train\.eval_every=N before it") as caught:
        toy_run(eval_every=0, select="best")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="must be 'last' or 'best', got 'first'"):
        toy_run(select="first")
    assert override(toy_run(eval_every=0), ["train.eval_every=5", "train.select=best"]).train.select == "best"
