"""Where runs run: in this process or in several. Whatever happens to one run, the others finish and it is named."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fragile_problem import fragile, fragile_run, raising, sound
from recollect.cli import main
from recollect.core.errors import ConfigError, RecollectError
from recollect.train import checkpoint as ckpt
from recollect.train.executors.base import Job
from recollect.train.loop import train
from recollect.train.run import FaceOff
from recollect.train.sweep import run_faceoff


@pytest.fixture(autouse=True)
def _children_find_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """As in a terminal, and then back: commands set handlers, and background jobs start with interrupts ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def statuses(jobs: Sequence[Job]) -> dict[str, str]:
    return {job.run.row: job.status for job in jobs}


def written(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("metrics.jsonl")}


def test_runs_follow_each_other_in_this_process_and_are_those_they_would_be_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.train.executors.processes.subprocess", None)
    shown: list[dict[str, str]] = []
    generator = torch.get_rng_state()
    jobs = run_faceoff(sound(), tmp_path / "all", display=lambda jobs: shown.append(statuses(jobs)))
    assert generator.equal(torch.get_rng_state())
    assert statuses(jobs) == {"first": "finished", "last": "finished"}
    assert all(list(each.values()).count("running") <= 1 for each in shown)
    assert {"first": "running", "last": "waiting"} in shown
    assert {"first": "finished", "last": "running"} in shown
    train(fragile_run("last"), tmp_path / "alone")
    a, b = (
        ckpt.load(d / "checkpoints", "step-00000006").tensors
        for d in (tmp_path / "all/recall/last/seed0", tmp_path / "alone")
    )
    assert all(a[name].equal(b[name]) for name in a)


def test_a_display_sees_the_steps_of_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_PAUSE_S", "0.15")
    steps: list[int] = []
    run_faceoff(replace(sound(), runs=sound().runs[:1]), tmp_path, display=lambda jobs: steps.append(jobs[0].step))
    assert len(set(steps) & set(range(1, 6))) >= 2


def test_an_exception_ends_one_run_and_its_traceback_is_kept(tmp_path: Path) -> None:
    jobs = {job.run.row: job for job in run_faceoff(raising(), tmp_path)}
    assert statuses(list(jobs.values())) == {"first": "finished", "raises": "failed", "last": "finished"}
    assert jobs["raises"].error == "ZeroDivisionError: the fourth batch"
    text = jobs["raises"].log.read_text()
    assert text.startswith("Traceback")
    assert "in batch" in text
    assert "is the last" in text


def test_the_command_names_what_failed_and_runs_only_that_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run's process is killed, one raises, one's directory is damaged: in processes of their own."""
    monkeypatch.setattr("recollect.cli.commands._report", lambda *_: 0)
    damaged = tmp_path / "recall/last/seed0/config.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b'{"kind": "ru\xff')
    words = ["faceoff", "fragile_problem:fragile", "--out", str(tmp_path), "--workers", "2"]
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "recall/dies/seed0 failed: killed by signal SIGKILL (log: " in lines[0]
    assert "recall/raises/seed0 failed: is the last (log: " in lines[1]
    assert "recall/last/seed0 failed: " in lines[2]
    assert "config.json cannot be read" in lines[2]
    assert "(log: " not in lines[2]

    before = written(tmp_path)
    shutil.rmtree(damaged.parent)
    monkeypatch.setenv("FRAGILE_MENDED", "1")
    assert main(words) == 0
    after = written(tmp_path)
    untouched = {path for path in after if before.get(path) == after[path]}
    assert untouched == {str(tmp_path / "recall/first/seed0/metrics.jsonl")}
    assert main(words) == 0
    assert written(tmp_path) == after


@pytest.mark.parametrize("damage", ["a file in its place", "results that are a list", "a torn checkpoint"])
def test_one_damaged_directory_leaves_the_others(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.cli.commands._report", lambda *_: 0)
    words = ["faceoff", "fragile_problem:sound", "--out", str(tmp_path)]
    place = tmp_path / "recall/first/seed0"
    if damage == "a file in its place":
        place.parent.mkdir(parents=True)
        place.write_text("")
    else:
        assert main(words) == 0
        shutil.rmtree(tmp_path / "recall/last")
        if damage == "results that are a list":
            (place / "results.json").write_text("[]")
        else:
            (place / "results.json").unlink()
            (place / "checkpoints/step-00000006.safetensors").write_bytes(b"short")
    capsys.readouterr()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("recollect: recall/first/seed0 failed: ")
    assert (tmp_path / "recall/last/seed0/results.json").exists()


def test_another_config_in_a_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    train(fragile_run("last", steps=3), tmp_path / "recall/last/seed0")
    with pytest.raises(RecollectError, match=r"train\.steps: 3 -> 6"):
        run_faceoff(sound(), tmp_path)
    assert not (tmp_path / "recall/first/seed0/metrics.jsonl").exists()


@pytest.mark.parametrize("how", ["by a signal", "by the display"])
def test_an_interruption_leaves_a_checkpoint_and_the_same_call_goes_on(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = FaceOff("one", "", (fragile_run("first", steps=40, eval_every=0, checkpoint_every=40),))
    before = signal.getsignal(signal.SIGINT)

    def interrupt(jobs: Sequence[Job]) -> None:
        if jobs[0].step >= 3:
            if how == "by the display":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("TOY_PAUSE_S", "0.1")
    with pytest.raises(KeyboardInterrupt):
        run_faceoff(single, tmp_path, display=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    place = tmp_path / "recall/first/seed0"
    (stem,) = ckpt.stems(place / "checkpoints")
    assert 3 <= ckpt.step_of(stem) < 40
    assert not (place / "log.txt").exists(), "a run that was stopped has not failed"
    monkeypatch.setenv("TOY_PAUSE_S", "0")
    assert statuses(run_faceoff(single, tmp_path)) == {"first": "finished"}
    train(single.runs[0], tmp_path / "alone")
    a, b = (ckpt.load(d / "checkpoints", "step-00000040").tensors for d in (place, tmp_path / "alone"))
    assert all(a[name].equal(b[name]) for name in a)


def test_outside_the_main_thread_there_are_no_signals_to_wait_for(tmp_path: Path) -> None:
    found: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(statuses(run_faceoff(sound(), tmp_path))))
    thread.start()
    thread.join()
    assert found == [{"first": "finished", "last": "finished"}]


def test_ways_of_running_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        run_faceoff(fragile(), tmp_path / "x", workers=2, ray="")
    out = str(tmp_path / "x")
    assert main(["faceoff", "fragile_problem:fragile", "--workers", "2", "--ray", "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RecollectError, match="use cpu or cuda"):
        run_faceoff(fragile(), tmp_path / "x", device="tpu")
    assert not (tmp_path / "x").exists()
