"""Many runs side by side: one failure costs nothing else, an interruption leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from recollect.cli.progress import PlainLines, table
from recollect.core.errors import ConfigError, RunError
from recollect.train import checkpoint as ckpt
from recollect.train.executors import processes
from recollect.train.executors.base import Job
from recollect.train.loop import train
from recollect.train.run import FaceOff
from recollect.train.sweep import longest_first, prepare, run_faceoff
from toy_problem import ToyConfig, faceoff, toy_run


@pytest.fixture(autouse=True)
def _children_find_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)


def test_a_failed_run_costs_the_others_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(faceoff(), runs=faceoff().runs[:2])
    jobs = {job.run.row: job for job in run_faceoff(small, tmp_path, workers=2, display=PlainLines())}
    assert jobs["good"].status == "finished"
    assert jobs["bad"].status == "failed"
    assert "loss is nan at step 20" in jobs["bad"].error
    assert "bad/seed0  failed  step" in capsys.readouterr().out.replace("recall/", "")
    alone = tmp_path / "alone"
    train(toy_run(), alone)
    a, b = (ckpt.load(d / "checkpoints", "step-00000030").tensors for d in (tmp_path / "recall/good/seed0", alone))
    assert all(a[name].equal(b[name]) for name in a), "a run of a sweep is the run it would be alone"
    environment = json.loads((tmp_path / "recall/good/seed0/environment.json").read_text())
    assert environment["threads"] == 1

    before = (tmp_path / "recall/good/seed0/metrics.jsonl").stat().st_mtime_ns
    again = {job.run.row: job.status for job in prepare(small, tmp_path)}
    assert again == {"good": "finished", "bad": "waiting"}
    assert (tmp_path / "recall/good/seed0/metrics.jsonl").stat().st_mtime_ns == before


def test_an_interruption_ends_the_children_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = replace(faceoff(), runs=(toy_run("good"),))
    started: list[subprocess.Popen[bytes]] = []

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*args, **kwargs))
        return started[-1]

    def interrupt(jobs: Sequence[Job]) -> None:
        if jobs[0].step >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
    monkeypatch.setenv("TOY_PAUSE_S", "0.2")
    with pytest.raises(KeyboardInterrupt):
        run_faceoff(single, tmp_path, workers=1, display=interrupt)
    (process,) = started
    assert process.poll() == 130, "it wrote a checkpoint and left by itself"
    stems = ckpt.stems(tmp_path / "recall/good/seed0/checkpoints")
    assert 3 <= ckpt.step_of(stems[-1]) < 30
    monkeypatch.setenv("TOY_PAUSE_S", "0")
    assert [job.status for job in run_faceoff(single, tmp_path, workers=1)] == ["finished"]


def test_another_faceoff_is_refused_before_anything_starts_and_seeds_may_be_added(tmp_path: Path) -> None:
    prepare(faceoff(), tmp_path)
    other = faceoff().overridden(["train.lr=0.5"])
    with pytest.raises(RunError, match=r"runs\.0\.train\.lr: 0\.01 -> 0\.5.*choose another --out"):
        run_faceoff(other, tmp_path)
    assert len(prepare(replace(faceoff(), seeds=(0, 1)), tmp_path)) == 6
    assert json.loads((tmp_path / "faceoff.json").read_text())["seeds"] == [0, 1]


def test_no_workers() -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        run_faceoff(faceoff(), Path("nowhere"), workers=0)
    assert not Path("nowhere").exists()


def test_the_longest_runs_start_first(tmp_path: Path) -> None:
    rows = (
        toy_run("limited", time_limit_s=50.0),
        toy_run("short", steps=10),
        toy_run("long", steps=99),
        toy_run("known", time_limit_s=9.0),
    )
    jobs = prepare(FaceOff("order", "", rows, seeds=(0, 1)), tmp_path)
    known = next(job for job in jobs if job.name == "recall/known/seed0")
    known.status = "finished"
    known.where.results.write_text('{"wall_s": 70.0}')
    order = [job.name.removeprefix("recall/") for job in longest_first(jobs)]
    assert order == [
        "long/seed0",
        "long/seed1",
        "short/seed0",
        "short/seed1",
        "known/seed1",
        "limited/seed0",
        "limited/seed1",
    ]


def test_time_left_is_bounded_by_the_limit(tmp_path: Path) -> None:
    (job,) = prepare(FaceOff("one", "", (toy_run(steps=100, time_limit_s=20.0),)), tmp_path)
    assert job.left_s is None
    job.where.metrics.write_text('{"step": 10, "loss": 1.5, "steps_per_s": 2.0, "elapsed_s": 5.0}\n')
    job.refresh()
    assert job.left_s == 15.0
    job.where.metrics.write_text('{"step": 90, "loss": 1.5, "steps_per_s": 2.0, "elapsed_s": 5.0}\n')
    job.refresh()
    assert job.left_s == 5.0


def test_the_table_shows_every_run(tmp_path: Path) -> None:
    jobs = prepare(replace(faceoff(), runs=(toy_run(), toy_run("odd", problem=ToyConfig(width=3)))), tmp_path)
    jobs[0].status, jobs[0].step, jobs[0].loss, jobs[0].headline, jobs[0].steps_per_s = "running", 6, 0.25, 0.5, 0.2
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(table("A title", jobs))
    text = console.export_text()
    assert "A title" in text
    assert "recall/good/seed0  running  6/30  0.25    0.5      0.2  2m00s" in text
    assert "recall/odd/seed0   waiting  0/30" in text
