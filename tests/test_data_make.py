"""Making stores: by several processes, on a cluster, killed at any moment, on a disk that fills up."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_ray import install
from recollect.cli import main
from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.data import EpisodeStore, Windows, collect
from recollect.data.check import check
from recollect.data.columns import encode
from recollect.data.writer import StoreWriter, partial_path
from recollect.envs import ENVS, DistractingMemory
from toy_env import BLOCKS, ToyEnv, slow_store

TOY = ToyEnv.Config()
PATH = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


def file_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    reports: dict[int, list[int]] = {}
    for workers in (0, 1, 3):
        reports[workers] = []
        path = tmp_path / str(workers)
        collect(TOY, 22, 3, path, "valid", lambda done, _, w=workers: reports[w].append(done), workers=workers)
    assert active_children() == []
    assert reports[0] == reports[1] == reports[3] == [4, 8, 12, 16, 20, 22]
    assert file_bytes(tmp_path / "0") == file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")


def test_what_follows_from_the_index_or_is_constant_costs_a_row_per_episode(tmp_path: Path) -> None:
    store = collect(TOY, 9, 0, tmp_path / "store")
    sizes = {key: len(array) for key, array in store.files.items()}
    assert sizes == {
        **dict.fromkeys(("image", "action", "reward", "speed"), 9 * TOY.length),
        **dict.fromkeys(("index", "layout", "is_terminal"), 9),
        **dict.fromkeys(("blocks", "digests"), 3),
    }
    frames = [TOY.generate(np.random.default_rng(), 1)]  # the keys
    assert set(store.keys) == set(frames[0])
    whole = Windows(store).batch_at(range(9))
    for key in ("layout", "is_first", "is_last", "is_terminal"):
        assert not store[key].flags.writeable
        for i in range(9):
            assert (whole[key][i] == store.episode(i)[key]).all()
        assert (store[key].reshape(whole[key].shape) == whole[key]).all()
    assert (whole["is_terminal"][:, -1] == whole["reward"][:, -1]).all()
    assert 0 < whole["is_terminal"].sum() < 9
    windows = Windows(store, 2)
    batch = windows.batch_at(range(len(windows)))
    per_episode = TOY.length - 1
    assert (batch["is_first"].reshape(9, per_episode, 2) == whole["is_first"][:, [[t, t + 1] for t in range(5)]]).all()
    for key in ("is_last", "is_terminal", "layout", "image"):
        expected = whole[key][:, [[t, t + 1] for t in range(per_episode)]]
        assert (batch[key].reshape(expected.shape) == expected).all(), key
    batch["layout"][:] = 77
    assert not (store["layout"] == 77).any()


def test_ten_thousand_episodes_stay_under_a_hundred_megabytes(tmp_path: Path) -> None:
    """By the bytes of a block: the files grow by nothing else."""
    config = ENVS["distracting-memory-100"]
    size = sum(
        array.nbytes for array in encode(config.generate(np.random.default_rng(0), 8), config.constant).files.values()
    )
    assert size / 8 * 10_000 < 98e6


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b.update(layout=b["speed"]), "'layout' changes within an episode"),
        (lambda b: b["is_first"].__setitem__((0, 2), True), "is_first must be True exactly at the first step"),
        (lambda b: b["is_first"].__setitem__((0, 0), False), "is_first must be True exactly at the first step"),
        (lambda b: b["is_last"].__setitem__((1, 2), True), "is_last must be True exactly at the last step"),
        (lambda b: b["is_terminal"].__setitem__((1, 2), True), "is_terminal may be True only at the last step"),
        (lambda b: b.update(is_last=b["is_last"].astype(np.uint8)), "'is_last' must be bool, got uint8"),
        (lambda b: b.update(who=b["reward"].astype(object)), "'who' holds Python objects"),
        (lambda b: b.update({key: array[:0] for key, array in b.items()}), "at least one episode of one step"),
    ],
)
def test_blocks_that_no_store_takes(tmp_path: Path, edit: Any, message: str) -> None:
    block = TOY.generate(np.random.default_rng(0), 2)
    edit(block)
    identity: dict[str, Any] = {"env": {}, "n_actions": 3, "seed": 0, "split": "train"}
    with StoreWriter(tmp_path / "store", identity, TOY.constant) as writer:
        with pytest.raises(DataError, match=message) as error:
            writer.append(block)
        assert str(error.value).startswith(str(tmp_path))
        assert writer.n_episodes == 0


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("raise", "the toy is broken"),
        ("change", "'layout' changes within an episode"),
        ("die", "make block 0 was killed by signal SIGKILL; the 0 episodes in .* are kept: .* fewer workers"),
    ],
)
def test_what_goes_wrong_in_a_worker(tmp_path: Path, trouble: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        collect(ToyEnv.Config(trouble=trouble), 9, 0, tmp_path / "store", workers=1)
    assert "\n" not in str(error.value)
    assert active_children() == []
    assert list(tmp_path.iterdir()) == [], "nothing was written, and yet something is left"


def written(path: Path) -> int:
    """Blocks that count in an unfinished store."""
    progress = partial_path(path) / "progress.json"
    return json.loads(progress.read_text())["n_blocks"] if progress.exists() else 0


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Each kill hits a run that goes on where the last was hit; in the end the bytes are those of a run in peace."""
    rng = random.Random(0)
    path = tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": PATH, "PYTHONDONTWRITEBYTECODE": "1"}
    done: list[int] = []
    kills = 0
    while kills < 20:
        workers = 1 if kills % 10 == 9 else 0
        command = [sys.executable, str(Path(__file__).parent / "toy_env.py"), str(path), str(workers)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = written(path)
        while kills % 2 and not path.exists() and written(path) == before:
            time.sleep(0.001)  # every other one is hit while it writes, the rest at their beginning
        time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        process.wait()
        process.stdout.close()
        kills += 1
        if path.exists():  # finished before it was hit: it must be whole, and we begin another
            assert check(path).sound
            path = tmp_path / f"store{kills}"
        else:
            with pytest.raises(DataError, match=r"unfinished|no such episode store"):
                EpisodeStore.open(path)
            done.append(written(path))
    assert 0 < max(done) < BLOCKS, "no kill hit a run that was writing"
    slow_store(path, workers=2, pause_s=0.002)
    slow_store(tmp_path / "peace", workers=0, pause_s=0.002)
    assert file_bytes(path) == file_bytes(tmp_path / "peace")
    assert check(path).sound


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["write", "fsync", "progress", "rename"])
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    collect(TOY, 14, 0, tmp_path / "peace")
    path, blocks = tmp_path / "store", []

    def fill_up(done: int, _: int) -> None:
        blocks.append(done)
        if len(blocks) == 2:
            if at == "write":
                append = StoreWriter._append

                def torn(writer: StoreWriter, key: str, array: Any) -> None:
                    append(writer, key, array[:1])
                    full_disk()

                monkeypatch.setattr(StoreWriter, "_append", torn)
            elif at == "fsync":
                monkeypatch.setattr(os, "fsync", full_disk)
            elif at == "progress":
                monkeypatch.setattr(Path, "replace", full_disk)
            else:
                monkeypatch.setattr(Path, "rename", full_disk)

    with pytest.raises(DataError) as error:
        collect(TOY, 14, 0, path, progress=fill_up)
    kept = 14 if at == "rename" else 8
    assert str(error.value) == (
        f"{path}.partial cannot be written: No space left on device; its {kept} episodes are kept: "
        f"run the same command again when there is room"
    )
    assert not path.exists()
    monkeypatch.undo()
    assert (partial_path(path) / "image.npy").stat().st_size == 128 + kept * TOY.length * 192, "space was not freed"
    blocks.clear()
    collect(TOY, 14, 0, path, progress=lambda done, _: blocks.append(done))
    assert blocks == ([] if at == "rename" else [12, 14])
    assert file_bytes(path) == file_bytes(tmp_path / "peace")


def test_an_interrupt_between_the_disk_and_the_memory_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block counts as soon as the disk says so."""
    from recollect.data import writer

    replace = writer._replace

    def interrupted(path: Path, data: Any) -> None:
        replace(path, data)
        if data.get("n_blocks") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(TOY, 9, 0, tmp_path / "store")
    monkeypatch.undo()
    done: list[int] = []
    collect(TOY, 9, 0, tmp_path / "store", progress=lambda n, _: done.append(n))
    assert done == [8, 9]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory; mend that and run"):
        collect(TOY, 4, 0, tmp_path / "file" / "store")


def test_what_a_killed_writer_left_half_written_is_swept_away(tmp_path: Path) -> None:
    path, identity = tmp_path / "store", {"env": {}, "n_actions": 3, "seed": 0, "split": "train"}
    StoreWriter(path, identity).close()
    stray = partial_path(path) / ".progress.json.1.partial"
    stray.write_text("{")
    with StoreWriter(path, identity):
        assert not stray.exists()


def test_interrupted_by_hand(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group: exit code 130, one line that says how to go on, and nobody is left."""
    path = tmp_path / "store"
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # with interrupts ignored, as by a shell's "&"
    command = [
        *background,
        sys.executable,
        "-m",
        "recollect",
        "data",
        "make",
        "distracting-memory-100",
        "--out",
        str(path),
    ]
    command += ["--episodes", "1000000", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": PATH}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 60
    while written(path) == 0:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "recollect: stopped; the same command goes on where it was\n"
    with pytest.raises(DataError, match="unfinished"):
        EpisodeStore.open(path)
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("processes of the command's group are left")


def test_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = install(monkeypatch)
    collect(TOY, 30, 0, tmp_path / "here")
    collect(TOY, 30, 0, tmp_path / "there", ray="host:6379")
    assert file_bytes(tmp_path / "here") == file_bytes(tmp_path / "there")
    assert (ray.address, ray.shut, len(ray.tasks)) == ("host:6379", 1, 8)
    assert all(task.options["num_cpus"] == 1 for task in ray.tasks)
    with pytest.raises(DataError, match="the toy is broken"):
        collect(ToyEnv.Config(trouble="raise"), 30, 0, tmp_path / "raises", ray="")
    assert len(ray.tasks) == 8 + 4, "more was under way than twice the cluster's CPUs"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecollectError, match=r"--ray needs Ray: pip install 'recollect\[cluster\]'"):
        collect(TOY, 4, 0, tmp_path / "none", ray="")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "sets")
    words = ["data", "make", "distracting-memory-100", "width=11", "--episodes", "5", "3", "--split", "train", "test"]
    assert main([*words, "--out", out, "--workers", "0"]) == 0
    assert "5 episodes, 135 frames" in capsys.readouterr().out
    train, test = (EpisodeStore.open(tmp_path / "sets" / split) for split in ("train", "test"))
    assert (train.n_episodes, test.n_episodes) == (5, 3)
    assert train.env_config == DistractingMemory.Config(width=11)
    assert {train.episode(i)["tiles"].tobytes() for i in range(5)}.isdisjoint(
        test.episode(i)["tiles"].tobytes() for i in range(3)
    )
    before = file_bytes(tmp_path / "sets" / "train")
    for wrong, message in (
        (["distracting-memory-101", "--episodes", "5"], "unknown environment 'distracting-memory-101'; did you mean"),
        (["distracting-memory-100", "width=10", "--episodes", "5"], "width must be at least 11, got 10"),
        (["distracting-memory-100", "wdth=20", "--episodes", "5"], "unknown key 'wdth'; did you mean 'width'?"),
        (["distracting-memory-100", "--episodes", "5", "--split", "train", "test"], "every split takes one number"),
        (["distracting-memory-100", "--episodes", "0"], "n_episodes must be at least 1, got 0"),
        (["distracting-memory-100", "--episodes", "5", "--workers", "-1"], "workers must not be negative, got -1"),
    ):
        capsys.readouterr()
        assert main(["data", "make", *wrong, "--out", out + "-new"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "sets-new").exists()
    assert main(["data", "make", "distracting-memory-100", "--episodes", "5", "--out", out + "/train"]) == 2
    assert "holds other episodes (env.width: 11 -> 100)" in capsys.readouterr().err
    assert file_bytes(tmp_path / "sets" / "train") == before


def test_impossible_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers must not be negative"):
        collect(TOY, 3, 0, tmp_path / "store", workers=-2)
    assert list(tmp_path.iterdir()) == []
