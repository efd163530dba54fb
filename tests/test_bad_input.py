"""Mistakes with the real recipes: one line on stderr, exit code 2, nothing half-written, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from recollect.cli import main

SMOKE = ["train", "demo-smoke", "--group"]
RECALL, WORLD = [*SMOKE, "recall", "--row"], [*SMOKE, "world", "--row"]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "dmeo", "--row", "gru"], "unknown recipe 'dmeo'; did you mean 'demo'?"),
        ([*RECALL, "mamba"], "has no row 'mamba' in group 'recall'; did you mean 'mamba2'?"),
        ([*RECALL, "mamba2", "train.stesp=3"], "unknown key 'stesp'; did you mean 'steps'?"),
        ([*RECALL, "mamba2", "train.steps=many"], "expected int, got 'many'"),
        ([*RECALL, "mamba2", "problem.backbone.layers.0.d_head=7"], "is not divisible by d_head 7"),
        (
            [*WORLD, "attention", "problem.dynamics.backbone.layers.0.n_heads=7"],
            "d_model 64 is not divisible by n_heads 7",
        ),
        ([*RECALL, "mamba2+hax", "problem.backbone.layers.0.patterns=[]"], "at least one pattern"),
        ([*RECALL, "mamba2+hax", "problem.backbone.layers.0.patterns.0.n_keys=0"], "n_keys must be at least 1"),
        ([*RECALL, "mamba2", "problem.backbone.layers.1.d_model=32"], "layers.1.d_model 32 must equal d_model 64"),
        ([*RECALL, "mamba2", "problem.task.n_keys=[0,3]"], "n_keys must be at least 1"),
        ([*WORLD, "gru", "problem.env.width=5"], "width must be at least 11"),
        ([*WORLD, "gru", "problem.observation=sound"], "not one of 'tiles', 'pixels'"),
        ([*WORLD, "gru", "--device", "cuda:9"], "cuda"),
        (["eval", "nowhere"], "nowhere"),
        (["imagine", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "nowhere"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_anything_is_written(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert message in complaint([*words, "--out", str(out)] if words[0] == "train" else words, capsys)
    assert not out.exists()


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_still_serves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [*RECALL, "mamba2", "--out", str(out), "train.select=last"]
    assert main(command) == 0
    (out / "results.json").unlink()
    newest = sorted((out / "checkpoints").glob("step-*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert newest.name in complaint(command, capsys)
    assert newest.name in complaint(["eval", str(out)], capsys)
    for part in newest.parent.glob(f"{newest.stem}.*"):
        part.unlink()
    assert main(command) == 0
    assert (out / "results.json").exists()


def test_a_damaged_episode_store_is_named_and_left_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    assert main([*WORLD, "gru", "--out", str(tmp_path / "one")]) == 0
    tiles = next(data.glob("*-train-*/tiles.npy"))
    damaged = tiles.read_bytes()[:-100]
    tiles.write_bytes(damaged)
    line = complaint([*WORLD, "s5", "--out", str(tmp_path / "two")], capsys)
    assert "tiles.npy" in line
    assert tiles.read_bytes() == damaged
    assert not (tmp_path / "two" / "results.json").exists()


def test_another_config_in_the_same_place_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [*RECALL, "mamba2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert "train.lr" in complaint([*command, "train.lr=0.5"], capsys)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
