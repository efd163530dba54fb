"""Face-offs on Ray: against a stand-in for it, and once against the real thing (``-m cluster``)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fake_ray import install, leftovers
from fragile_problem import raising, sound
from recollect.cli import arguments, main
from recollect.core.errors import RecollectError
from recollect.train import checkpoint as ckpt
from recollect.train.executors.base import Job
from recollect.train.executors.cluster import RETRIES, Cluster, run_task
from recollect.train.runtime import SWEEP_COMMAND
from recollect.train.sweep import prepare, run_faceoff


@pytest.fixture(autouse=True)
def _command_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task notes the face-off's command in the environment of its worker, which here is this process."""
    monkeypatch.setenv(SWEEP_COMMAND, "pytest")


def statuses(jobs: Sequence[Job]) -> dict[str, str]:
    return {job.run.row: job.status for job in jobs}


def test_every_run_is_a_task_and_one_failure_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = install(monkeypatch, crashing={"first"})
    shown: list[dict[str, str]] = []
    jobs = run_faceoff(raising(), tmp_path, ray="host:6379", display=lambda jobs: shown.append(statuses(jobs)))
    assert statuses(jobs) == {"first": "failed", "raises": "failed", "last": "finished"}
    errors = {job.run.row: job.error for job in jobs}
    assert errors["first"] == "WorkerCrashedError: The worker died unexpectedly."
    assert errors["raises"] == "ZeroDivisionError: the fourth batch"
    assert (tmp_path / "recall/raises/seed0/log.txt").read_text().startswith("Traceback")
    assert {"first": "queued", "raises": "queued", "last": "queued"} in shown
    assert (ray.address, ray.shut) == ("host:6379", 1)
    runs = [task.options for task in ray.tasks if task.is_run]
    assert runs == [{"num_cpus": 1, "num_gpus": 0, "max_retries": RETRIES}] * 3
    environment = json.loads((tmp_path / "recall/last/seed0/environment.json").read_text())
    assert environment["command"] == "pytest", "the command of the face-off, not that of a worker"

    ray.crashing.clear()
    monkeypatch.setenv("FRAGILE_MENDED", "1")
    before = (tmp_path / "recall/last/seed0/metrics.jsonl").stat().st_mtime_ns
    assert set(statuses(run_faceoff(raising(), tmp_path, ray="")).values()) == {"finished"}
    assert (tmp_path / "recall/last/seed0/metrics.jsonl").stat().st_mtime_ns == before
    assert ray.address is None, "no address given: Ray's own rule"
    started = len(ray.tasks)
    run_faceoff(raising(), tmp_path, ray="")
    assert len(ray.tasks) == started, "finished runs were started again"
    assert not leftovers(tmp_path)


def test_a_task_that_died_goes_on_from_its_checkpoint_when_ray_starts_it_again(tmp_path: Path) -> None:
    run = sound().runs[0]
    (job, _) = prepare(sound(), tmp_path)
    from recollect.train.loop import StoppedError, train

    with pytest.raises(StoppedError):
        train(run, job.where.path, stop=lambda: ckpt.stems(job.where.checkpoints) != [])
    assert run_task(run, str(job.where.path), "cpu", "pytest") == ("finished", "")
    environment = json.loads(job.where.environment.read_text())
    assert len(environment["earlier"]) == 1
    assert job.where.begun.exists()


def test_queued_becomes_running_when_a_worker_takes_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, room=0)
    jobs = prepare(sound(), tmp_path)
    executor = Cluster()
    for job in jobs:
        job.where.begun.write_text("another host, last week")
        executor.start(job)
    executor.poll(lambda: None)
    assert [job.status for job in jobs] == ["queued", "queued"]
    jobs[1].where.begun.write_text("host 123\n")
    executor.poll(lambda: None)
    assert [job.status for job in jobs] == ["queued", "running"]


def test_an_interruption_asks_every_task_to_stop_and_then_insists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = install(monkeypatch, room=0)

    def interrupt(_jobs: Sequence[Job]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_faceoff(sound(), tmp_path, ray="auto", display=interrupt)
    assert ray.calls == ["cancel softly"] * 2 + ["cancel hard"] * 2
    assert ray.shut == 1


def test_a_cluster_that_was_connected_before_is_left_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, initialised=True)
    run_faceoff(replace(sound(), runs=sound().runs[:1]), tmp_path, ray="")
    assert (ray.shut, ray.address) == (0, None)


def test_a_node_without_the_directory_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = install(monkeypatch, blind={"two"})
    monkeypatch.setattr("recollect.cli.commands.signal.signal", lambda *_: None)
    assert main(["faceoff", "fragile_problem:sound", "--out", str(tmp_path), "--ray"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Ray node two does not see " in error
    assert "all of them share" in error
    assert not any(task.is_run for task in ray.tasks)
    assert ray.shut == 1
    assert not leftovers(tmp_path)
    outcome, why = run_task(sound().runs[0], str(tmp_path / "elsewhere"), "cpu", "pytest")
    assert outcome == "failed"
    assert "does not see" in why
    assert not (tmp_path / "elsewhere").exists()


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, connects=False)
    with pytest.raises(
        RecollectError, match="cannot connect to the Ray cluster 'auto': ConnectionError: Could not find"
    ):
        run_faceoff(sound(), tmp_path, ray="auto")
    ray.connects = True
    with pytest.raises(RecollectError, match="has no GPU; use --device cpu"):
        run_faceoff(sound(), tmp_path, ray="", device="cuda")
    with pytest.raises(RecollectError, match="use --device cuda, not cuda:1"):
        run_faceoff(sound(), tmp_path, ray="", device="cuda:1")


def test_a_gpu_for_every_run_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch, gpus=1, room=0)
    executor = Cluster(device="cuda")
    executor.start(prepare(sound(), tmp_path)[0])
    assert ray.tasks[-1].options["num_gpus"] == 1


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("recollect.cli.commands.signal.signal", lambda *_: None)
    assert main(["faceoff", "fragile_problem:sound", "--ray", "auto", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "recollect: --ray needs Ray: pip install 'recollect[cluster]'\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "ray"),
    [
        (["demo"], None),
        (["demo", "--ray"], ""),
        (["--ray", "demo"], ""),
        (["demo", "--ray", "--seeds", "1"], ""),
        (["demo", "--ray", "auto"], "auto"),
        (["--ray", "10.0.0.1:6379", "demo"], "10.0.0.1:6379"),
        (["demo", "--ray", "ray://head:10001"], "ray://head:10001"),
    ],
)
def test_the_address_may_be_left_out(words: list[str], ray: str | None) -> None:
    command = arguments.parse(["faceoff", *words])
    assert isinstance(command, arguments.FaceOff)
    assert (command.recipe, command.ray) == ("demo", ray)


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_on_the_real_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose process is killed again and again, one that raises and two that finish; then all are mended."""
    from fragile_problem import fragile

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    jobs = {job.run.row: job for job in run_faceoff(fragile(), tmp_path, ray="local")}
    expected = {"first": "finished", "dies": "failed", "raises": "failed", "last": "finished"}
    assert statuses(list(jobs.values())) == expected
    assert "\n" not in jobs["dies"].error
    starts = json.loads((tmp_path / "recall/dies/seed0/environment.json").read_text())["earlier"]
    assert len(starts) == RETRIES
    monkeypatch.setenv("FRAGILE_MENDED", "1")
    assert set(statuses(run_faceoff(fragile(), tmp_path, ray="local")).values()) == {"finished"}

    slow = replace(sound(), name="slow", runs=(replace(sound().runs[0], row="slow"),))
    slow = slow.overridden(["train.steps=400", "train.checkpoint_every=400"])

    def interrupt(jobs: Sequence[Job]) -> None:
        if jobs[0].step >= 3:
            raise KeyboardInterrupt

    monkeypatch.setenv("TOY_PAUSE_S", "0.2")
    with pytest.raises(KeyboardInterrupt):
        run_faceoff(slow, tmp_path / "slow", ray="local", display=interrupt)
    stems = ckpt.stems(tmp_path / "slow/recall/slow/seed0/checkpoints")
    assert 3 <= ckpt.step_of(stems[-1]) < 400
