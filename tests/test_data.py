"""Episode stores: what they hold, how they survive kills and damage, and the windows read from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.core.config import to_dict
from recollect.core.errors import ConfigError, DataError
from recollect.core.seeding import Streams
from recollect.data import EpisodeStore, Windows, collect, observations
from recollect.data.writer import StoreWriter
from recollect.envs import DistractingMemory
from recollect.envs.distracting_memory import Layout, draw, generate
from recollect.envs.tiles import render

ENV = DistractingMemory.Config(width=11)
T = ENV.episode_length


def file_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def block(n: int, length: int, first: int = 0) -> dict[str, np.ndarray]:
    """Episodes whose ``time`` counts on from ``first`` over the whole store."""
    is_first = np.zeros((n, length), dtype=np.bool_)
    is_first[:, 0] = True
    time = first + np.arange(n * length, dtype=np.int64).reshape(n, length)
    return {"time": time, "action": (time % 2).astype(np.uint8), "is_first": is_first}


def uneven_store(path: Path) -> EpisodeStore:
    blocks = [block(2, 3), block(1, 7, 6), block(1, 1, 13), block(2, 4, 14)]
    return EpisodeStore.create(path, blocks, env={"kind": "counting"}, n_actions=2, seed=0, split="train")


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    return collect(ENV, 6, 0, tmp_path / "store")


class KilledError(Exception):
    """Stands in for a kill."""


def kill_after(n_blocks: int) -> Callable[[int, int], None]:
    calls: list[int] = []

    def progress(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) == n_blocks:
            raise KilledError

    return progress


def test_collected_episodes_are_the_generated_ones(tmp_path: Path):
    n = ENV.block_episodes + 3
    reports: list[tuple[int, int]] = []
    store = collect(ENV, n, 5, tmp_path / "a" / "store", "valid", lambda *report: reports.append(report))
    assert reports == [(ENV.block_episodes, n), (n, n)]
    assert (store.n_episodes, store.n_steps, store.n_actions) == (n, n * T, 3)
    assert (store.index == np.stack([np.arange(n) * T, np.full(n, T)], axis=1)).all()
    blocks = [generate(ENV, Streams(5).numpy("env", "valid", b), ENV.block_episodes) for b in range(2)]
    assert set(store.keys) == set(blocks[0])
    for key in store.keys:
        expected = np.concatenate([b[key] for b in blocks])[:n]
        assert store[key].dtype == expected.dtype
        assert (store[key].reshape(expected.shape) == expected).all()
        assert (store.episode(ENV.block_episodes + 1)[key] == expected[ENV.block_episodes + 1]).all()
        assert not store[key].flags.writeable
    assert store.env_config == ENV
    assert store.meta["env"] == to_dict(ENV)
    assert (store.meta["seed"], store.meta["split"]) == (5, "valid")
    assert EpisodeStore.open(tmp_path / "a" / "store", verify=True).n_steps == n * T
    assert np.load(tmp_path / "a" / "store" / "tiles.npy").shape == (n * T, 5, 5)


def test_splits_and_seeds_share_nothing(tmp_path: Path):
    config = DistractingMemory.Config(width=60)
    runs = [(0, "train"), (0, "valid"), (0, "test"), (1, "train")]
    episodes: list[bytes] = []
    for seed, split in runs:
        store = collect(config, 20, seed, tmp_path / f"{split}{seed}", split)
        episodes += [store.episode(i)["tiles"].tobytes() for i in range(20)]
    assert len(set(episodes)) == 80


def test_a_shorter_store_is_the_beginning_of_a_longer_one(tmp_path: Path):
    short = collect(ENV, ENV.block_episodes + 5, 0, tmp_path / "short")
    long = collect(ENV, ENV.block_episodes + 9, 0, tmp_path / "long")
    for key in short.keys:
        assert (short[key] == long[key][: short.n_steps]).all()


def test_collecting_again_does_nothing(tmp_path: Path):
    collect(ENV, 4, 0, tmp_path / "store")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    collect(ENV, 4, 0, tmp_path / "store", progress=kill_after(1))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path: Path, n_blocks: int, torn: bool):
    n = 2 * ENV.block_episodes + 3
    collect(ENV, n, 0, tmp_path / "whole")
    path = tmp_path / "killed"
    with pytest.raises(KilledError):
        collect(ENV, n, 0, path, progress=kill_after(n_blocks))
    assert not path.exists()
    with pytest.raises(DataError, match="unfinished"):
        EpisodeStore.open(path)
    if torn:  # killed while a block was being appended: some files are longer than what counts
        for name in ("tiles.npy", "index.npy"):
            with (tmp_path / "killed.partial" / name).open("ab") as file:
                file.write(b"torn")
    reports: list[int] = []
    collect(ENV, n, 0, path, progress=lambda done, _: reports.append(done))
    assert reports == [ENV.block_episodes, 2 * ENV.block_episodes, n][n_blocks:]
    assert file_bytes(path) == file_bytes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_killed_before_the_first_block_and_while_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collect(ENV, 3, 0, tmp_path / "whole")

    def kill(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_append", kill)
        with pytest.raises(KilledError):
            collect(ENV, 3, 0, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(KilledError):
            collect(ENV, 3, 0, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(KilledError):
            collect(ENV, 3, 0, tmp_path / "killed")
    assert (tmp_path / "killed" / "progress.json").exists()
    assert collect(ENV, 3, 0, tmp_path / "killed").n_episodes == 3
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")


def test_create_goes_on_too(tmp_path: Path):
    whole = uneven_store(tmp_path / "whole")

    def blocks() -> Any:
        yield block(2, 3)
        yield block(1, 7, 6)
        raise KilledError

    with pytest.raises(KilledError):
        EpisodeStore.create(tmp_path / "killed", blocks(), env={"kind": "counting"}, n_actions=2, seed=0, split="train")
    assert (uneven_store(tmp_path / "killed")["time"] == whole["time"]).all()
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")


def test_other_things_in_the_way(tmp_path: Path):
    path = tmp_path / "store"
    with pytest.raises(KilledError):
        collect(ENV, 300, 0, path, progress=kill_after(1))
    with pytest.raises(DataError, match=r"store\.partial is another unfinished store \(seed: 0 -> 1\)"):
        collect(ENV, 300, 1, path)
    collect(ENV, 300, 0, path)
    for n, seed, split, env, what in (
        (301, 0, "train", ENV, "n_episodes: 300 -> 301"),
        (300, 1, "train", ENV, "seed: 0 -> 1"),
        (300, 0, "test", ENV, "split: train -> test"),
        (300, 0, "train", DistractingMemory.Config(width=12), "env.width: 11 -> 12"),
    ):
        with pytest.raises(DataError, match=what):
            collect(env, n, seed, path, split)
    with pytest.raises(DataError, match="exists already"):
        uneven_store(path)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.npy").write_bytes(b"precious")
    with pytest.raises(DataError, match="holds something else"):
        collect(ENV, 3, 0, tmp_path / "new")
    assert (tmp_path / "new.partial" / "mine.npy").read_bytes() == b"precious"


def test_damaged_leftovers(tmp_path: Path):
    path, partial = tmp_path / "store", tmp_path / "store.partial"
    with pytest.raises(KilledError):
        collect(ENV, 300, 0, path, progress=kill_after(1))
    progress = (partial / "progress.json").read_text()
    (partial / "progress.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        collect(ENV, 300, 0, path)
    (partial / "progress.json").write_text(progress)
    (partial / "tiles.npy").write_bytes((partial / "tiles.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        collect(ENV, 300, 0, path)


def test_two_writers_notice_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    identity: dict[str, Any] = {"env": {}, "n_actions": 2, "seed": 0, "split": "train"}
    with StoreWriter(tmp_path / "store", identity) as one:
        one.append(block(2, 3))
        before = file_bytes(tmp_path / "store.partial")
        with pytest.raises(DataError, match="another process"):
            StoreWriter(tmp_path / "store", identity)
        assert file_bytes(tmp_path / "store.partial") == before
    # Where the system has no locks, the sizes of the files tell.
    monkeypatch.setattr("recollect.data.writer.lock_directory", lambda _path: lambda: None)
    one, two = StoreWriter(tmp_path / "store", identity), StoreWriter(tmp_path / "store", identity)
    two.append(block(2, 3))
    with pytest.raises(DataError, match="another process"):
        one.append(block(2, 3))
    with pytest.raises(DataError, match="another process"):
        one.finish()


def test_impossible_collections(tmp_path: Path):
    path = tmp_path / "store"
    with pytest.raises(ConfigError, match="unknown split 'trian'; did you mean 'train'"):
        collect(ENV, 3, 0, path, "trian")
    with pytest.raises(ConfigError, match="n_episodes must be at least 1"):
        collect(ENV, 0, 0, path)
    assert list(tmp_path.iterdir()) == []


def test_impossible_blocks(tmp_path: Path):
    identity: dict[str, Any] = {"env": {}, "n_actions": 2, "seed": 0, "split": "train"}
    writer = StoreWriter(tmp_path / "store", identity)
    with pytest.raises(DataError, match="at least one episode"):
        writer.finish()
    with pytest.raises(DataError, match="needs 'action', got is_first, time"):
        writer.append({key: array for key, array in block(1, 2).items() if key != "action"})
    with pytest.raises(DataError, match=r"key 'time' is \(2, 3\), but action is \(2, 4\)"):
        writer.append({**block(2, 4), "time": np.zeros((2, 3))})
    writer.append(block(1, 2))
    with pytest.raises(DataError, match=r"block 1 differs from those before it \(time.dtype: <i8 -> <f8\)"):
        writer.append({**block(1, 2), "time": np.zeros((1, 2))})
    writer.append(block(1, 2, 2))
    writer.finish()
    assert EpisodeStore.open(tmp_path / "store")["time"].tolist() == [0, 1, 2, 3]


def edit_meta(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((path / "meta.json").read_text())
    edit(meta)
    (path / "meta.json").write_text(json.dumps(meta))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda p: (p / "tiles.npy").write_bytes((p / "tiles.npy").read_bytes()[:-1]),
        r"tiles\.npy is damaged: \d+ bytes, expected",
    ),
    "longer": (
        lambda p: (p / "tiles.npy").write_bytes((p / "tiles.npy").read_bytes() + b"x"),
        r"tiles\.npy is damaged: \d+ bytes, expected",
    ),
    "missing file": (lambda p: (p / "reward.npy").unlink(), r"reward\.npy is missing"),
    "header": (lambda p: flip_bit(p / "tiles.npy", 0), "header cannot be read"),
    "other type": (
        lambda p: np.save(p / "position.npy", np.load(p / "position.npy").view(np.uint32)),
        r"position\.npy is damaged: its header differs",
    ),
    "index": (lambda p: flip_bit(p / "index.npy", 128), "index does not match"),
    "no meta": (lambda p: (p / "meta.json").unlink(), "not an episode store"),
    "broken meta": (lambda p: (p / "meta.json").write_text("{"), r"meta\.json is damaged"),
    "meta is a list": (lambda p: (p / "meta.json").write_text("[]"), r"meta\.json is damaged"),
    "meta lacks files": (lambda p: edit_meta(p, lambda m: m.pop("files")), r"meta\.json is damaged"),
    "meta lacks a size": (lambda p: edit_meta(p, lambda m: m["files"]["tiles"].pop("bytes")), r"meta\.json is damaged"),
    "other schema": (
        lambda p: edit_meta(p, lambda m: m.update(schema=99, recollect="9.0")),
        "has schema 99, this version reads 2: make it again, or use recollect 9.0",
    ),
    "gone": (shutil.rmtree, "no such episode store; make it first: recollect data make"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "not an episode store"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damage_is_noticed_on_opening(store: EpisodeStore, damage: str):
    act, message = DAMAGES[damage]
    act(store.path)
    with pytest.raises(DataError, match=message) as error:
        EpisodeStore.open(store.path)
    assert "\n" not in str(error.value)
    assert str(store.path) in str(error.value)


@pytest.mark.parametrize("key", ["tiles", "reward", "index"])
def test_a_flipped_bit_is_noticed_by_verify(store: EpisodeStore, key: str):
    EpisodeStore.open(store.path, verify=True)
    flip_bit(store.path / f"{key}.npy", -1 if key != "index" else 128)
    with pytest.raises(DataError, match=rf"{key}\.npy is damaged: its checksum differs"):
        EpisodeStore.open(store.path, verify=True)
    if key != "index":
        EpisodeStore.open(store.path)


def test_unknown_key_and_unknown_environment(store: EpisodeStore, tmp_path: Path):
    with pytest.raises(DataError, match="no key 'tile'; did you mean 'tiles'"):
        store["tile"]
    with pytest.raises(ConfigError, match="unknown kind 'counting'"):
        _ = uneven_store(tmp_path / "uneven").env_config


def test_windows_are_all_runs_within_one_episode(tmp_path: Path):
    store = uneven_store(tmp_path / "store")
    windows = Windows(store, 3)
    assert len(windows) == 1 + 1 + 5 + 0 + 2 + 2
    starts = [0, 3, 6, 7, 8, 9, 10, 14, 15, 18, 19]
    batch = windows.batch_at(range(len(windows)))
    assert batch["time"].tolist() == [[s, s + 1, s + 2] for s in starts]
    assert batch["is_first"][:, 1:].sum() == 0
    assert np.flatnonzero(batch["is_first"][:, 0]).tolist() == [0, 1, 2, 7, 9]
    places = [(0, 0), (1, 0), *((2, i) for i in range(5)), (4, 0), (4, 1), (5, 0), (5, 1)]
    assert [windows.number(*place) for place in places] == list(range(len(windows)))
    for place in ((0, 1), (3, 0), (4, -1), (4, 2)):
        with pytest.raises(DataError, match=f"episode {place[0]} has . steps, no window of 3 from step {place[1]}"):
            windows.number(*place)
    with pytest.raises(DataError, match=r"episode numbers lie in 0\.\.5, got 6"):
        windows.number(6)
    assert len(Windows(store, 7)) == 1
    assert len(Windows(store, 1)) == store.n_steps
    sampled = windows.sample(np.random.default_rng(0), 400)["time"][:, 0]
    assert set(sampled.tolist()) == set(starts)
    again = windows.sample(np.random.default_rng(0), 400)["time"][:, 0]
    assert (sampled == again).all()


def test_actions_are_one_hot_and_zero_at_first_steps(store: EpisodeStore):
    batch = Windows(store).batch_at([4, 1])
    assert batch["action"].dtype == np.float32
    assert batch["action"].shape == (2, T, 3)
    assert (batch["action"][:, 0] == 0).all()
    for row, episode in enumerate((4, 1)):
        stored = store.episode(episode)
        assert (batch["action"][row, 1:] == np.eye(3)[stored["action"][1:]]).all()
        for key in store.keys:
            if key != "action":
                assert (batch[key][row] == stored[key]).all()
    # A window from the middle of an episode begins with a real action.
    assert (Windows(store, 2).batch_at([1])["action"].sum(axis=-1) == 1).all()


def test_action_leads_to_its_observation(store: EpisodeStore):
    """Time alignment: playing action_t turns the observation of t - 1 into that of t, and the reward comes with it."""
    batch = Windows(store).batch_at(range(6))
    env = DistractingMemory(ENV)
    rng = Streams(0).numpy("env", "train", 0)
    layout = draw(ENV, rng, ENV.block_episodes)
    for i in range(6):
        observation, _ = env.reset(options={"layout": Layout(*(part[i : i + 1] for part in layout))})
        assert (batch["tiles"][i, 0] == observation).all()
        for t in range(1, T):
            observation, reward, *_ = env.step(int(batch["action"][i, t].argmax()))
            assert (batch["tiles"][i, t] == observation).all()
            assert batch["reward"][i, t] == reward


def test_batches_are_copies_of_the_keys_asked_for(store: EpisodeStore):
    windows = Windows(store, keys=("tiles", "action"))
    batch = windows.batch_at([0])
    assert set(batch) == {"tiles", "action"}
    assert (batch["action"][:, 0] == 0).all()
    batch["tiles"][:] = 200
    assert not (store["tiles"] == 200).any()


def test_observations_are_codes_or_pictures(store: EpisodeStore):
    batch = Windows(store, 4).batch_at([0, 7])
    assert observations(batch, "tiles") is batch["tiles"]
    pixels = observations(batch, "pixels")
    assert pixels.shape == (2, 4, 40, 40, 3)
    assert (pixels[1, 2] == render(batch["tiles"][1, 2])).all()
    wrong: Any = "text"
    with pytest.raises(ConfigError, match="'tiles' or 'pixels', got 'text'"):
        observations(batch, wrong)


def test_impossible_windows(store: EpisodeStore, tmp_path: Path):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Windows(store, 0)
    with pytest.raises(DataError, match=f"the longest episode has {T} steps, shorter than a window of {T + 1}"):
        Windows(store, T + 1)
    with pytest.raises(DataError, match="no key 'pixels'"):
        Windows(store, keys=("pixels",))
    with pytest.raises(DataError, match="episodes have 1 to 7 steps; give a window length"):
        Windows(uneven_store(tmp_path / "uneven"))
    for bad in ([6], [-1]):
        with pytest.raises(DataError, match=r"window numbers lie in 0\.\.5"):
            Windows(store).batch_at(bad)
