"""Stores checked, mended, shown, imported and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.cli import main
from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.data import EpisodeStore, collect
from recollect.data.check import check, mend, ranges
from recollect.data.exporting import export_minari
from recollect.data.importing import KEYS, import_memory_maze
from recollect.data.showing import BORDER, COLOURS, GAP, LINE, pictures, show
from recollect.data.writer import partial_path
from recollect.envs import DistractingMemory
from recollect.envs.memory_maze import MemoryMaze
from recollect.envs.tiles import N_CODES, render
from toy_env import ToyEnv

TOY = ToyEnv.Config()
TILES = DistractingMemory.Config(width=11)


@pytest.fixture
def toys(tmp_path: Path) -> EpisodeStore:
    return collect(TOY, 14, 0, tmp_path / "toys")


def file_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-n_bytes])


FRAME = 8 * 8 * 3
BLOCK = 4 * TOY.length * FRAME

DAMAGES: dict[str, tuple[Callable[[Path], Any], str, set[int]]] = {
    "a bit of a frame": (
        lambda p: flip(p / "image.npy", 128 + BLOCK + 7),
        "image.npy: its checksum differs; episodes 4..7",
        {4, 5, 6, 7},
    ),
    "a bit of a constant": (
        lambda p: flip(p / "layout.npy", -1),
        "layout.npy: its checksum differs; episodes 12..13",
        {12, 13},
    ),
    "an end": (
        lambda p: cut(p / "image.npy", 3 * BLOCK // 2),
        "image.npy: the file ends before them; episodes 8..11",
        set(range(8, 14)),
    ),
    "a file": (lambda p: (p / "reward.npy").unlink(), "reward.npy is missing", set(range(14))),
    "a header": (lambda p: flip(p / "action.npy", 20), "action.npy: its header is damaged", set()),
    "a tail": (
        lambda p: (p / "action.npy").write_bytes((p / "action.npy").read_bytes() + b"x"),
        "action.npy: 1 bytes too many",
        set(),
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damage_is_named_and_mended(toys: EpisodeStore, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    whole = file_bytes(toys.path)
    reports: list[tuple[int, int]] = []
    assert check(toys.path, lambda *report: reports.append(report)).sound
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    act, message, bad = DAMAGES[damage]
    act(toys.path)
    report = check(toys.path)
    assert message in report.problems
    assert report.bad == bad
    with pytest.raises(DataError, match=r"damaged|missing"):
        EpisodeStore.open(toys.path, verify=True)
    capsys.readouterr()
    assert main(["data", "check", str(toys.path)]) == 2
    said = capsys.readouterr()
    assert message in said.out
    assert said.err.count("\n") == 1
    assert f"{len(bad)} of 14 episodes are bad" in said.err
    assert f"recollect data check {toys.path} --mend" in said.err
    assert main(["data", "check", str(toys.path), "--mend"]) == 0
    assert file_bytes(toys.path) == whole
    assert mend(toys.path) == 0


def test_values_that_cannot_be(tmp_path: Path) -> None:
    def store(name: str, env: Any, **changes: Any) -> Path:
        block = env.generate(np.random.default_rng(0), 3)
        for key, value in changes.items():
            block[key][1, 2] = value
        config = {"kind": env.kind}
        EpisodeStore.create(tmp_path / name, [block], env=config, n_actions=3, seed=0, split="train")
        return tmp_path / name

    for name, env, changes, message in (
        ("action", TOY, {"action": 3}, "action.npy: actions outside 0..2; episodes 1"),
        ("reward", TOY, {"reward": np.nan}, "reward.npy: numbers that are not finite; episodes 1"),
        ("speed", TOY, {"speed": np.inf}, "speed.npy: numbers that are not finite; episodes 1"),
        ("tiles", TILES, {"tiles": N_CODES}, f"tiles.npy: tile codes above {N_CODES - 1}; episodes 1"),
    ):
        report = check(store(name, env, **changes))
        assert report.problems == [message]
        assert (report.bad, report.damaged) == ({1}, {})
    assert check(store("fine", TILES)).sound
    blind = {k: v for k, v in TOY.generate(np.random.default_rng(0), 2).items() if k != "image"}
    EpisodeStore.create(tmp_path / "blind", [blind], env={"kind": TOY.kind}, n_actions=3, seed=0, split="train")
    assert (
        "image.npy: None per frame, but toy-pictures shows (8, 8, 3); episodes 0..1"
        in check(tmp_path / "blind").problems
    )


def test_what_cannot_be_checked_or_mended(
    toys: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(toys.path / "image.npy", 200)
    meta = json.loads((toys.path / "meta.json").read_text())
    for change, message in (
        ({"source": "elsewhere"}, "its lost episodes stay lost"),
        ({"env": {"kind": "unknown"}}, "its lost episodes stay lost"),
        ({"seed": 1}, "this version makes other episodes of toy-pictures; mend it with recollect "),
    ):
        (toys.path / "meta.json").write_text(json.dumps({**meta, **change}))
        before = (toys.path / "image.npy").read_bytes()
        with pytest.raises(DataError, match=message):
            mend(toys.path)
        assert (toys.path / "image.npy").read_bytes() == before
    (toys.path / "meta.json").write_text(json.dumps({**meta, "schema": 1, "recollect": "0.5"}))
    assert main(["data", "check", str(toys.path)]) == 2
    assert "has schema 1, this version reads 2: make it again, or use recollect 0.5\n" in capsys.readouterr().err
    (toys.path / "meta.json").write_text(json.dumps(meta))
    flip(toys.path / "digests.npy", -1)
    with pytest.raises(DataError, match=r"digests\.npy is damaged, and with it the whole store"):
        check(toys.path)
    with pytest.raises(DataError, match=r"digests\.npy is damaged: its checksum differs"):
        EpisodeStore.open(toys.path, verify=True)
    assert main(["data", "check", str(tmp_path / "nothing")]) == 2
    assert "no such episode store" in capsys.readouterr().err


def test_a_folder_of_stores_is_checked_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid"):
        collect(TOY, 5, 0, tmp_path / "sets" / split, split)
    assert main(["data", "check", str(tmp_path / "sets")]) == 0
    assert capsys.readouterr().out.count(": sound") == 2
    flip(tmp_path / "sets" / "valid" / "image.npy", 300)
    assert main(["data", "check", str(tmp_path / "sets")]) == 2
    said = capsys.readouterr()
    assert said.out.count(": sound") == 1
    assert "sets/valid: 4 of 5 episodes are bad (0..3)" in said.err


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([4]) == "4"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0..2, 5, 7..8"


@pytest.mark.parametrize("env", [TOY, TILES], ids=lambda env: env.kind)
def test_strips_and_films(env: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    store = collect(env, 3, 0, tmp_path / "store")
    film = pictures(store, 2)
    assert film.shape[0] == env.episode_length
    seen = store.episode(2)
    assert (film == (seen["image"] if env is TOY else render(seen["tiles"]))).all()
    with image.open(show(store, 2, tmp_path / "out" / "strip.png", frames=env.episode_length)) as opened:
        strip = np.array(opened)
    zoom = 80 // film.shape[1]
    width = film.shape[2] * zoom + 2 * (GAP + BORDER)
    height = film.shape[1] * zoom + 2 * (GAP + BORDER) + 3 * LINE
    per_row = min(10, env.episode_length)
    rows = -(-env.context_length // 10) + -(-env.query_length // 10)
    assert strip.shape == (rows * height, per_row * width, 3)

    def card(row: int, column: int) -> np.ndarray:
        return strip[row * height : (row + 1) * height, column * width : (column + 1) * width]

    edge = GAP + BORDER
    first_query = card(-(-env.context_length // 10), 0)
    for shown, part, t in ((card(0, 1), "context", 1), (first_query, "query", env.context_length)):
        assert (shown[GAP, GAP:-GAP] == COLOURS[part]).all()
        inner = shown[edge : edge + film.shape[1] * zoom : zoom, edge : edge + film.shape[2] * zoom : zoom]
        assert (inner == film[t]).all()
    words = [card(0, t)[-3 * LINE :] for t in (0, 1)]
    assert all((word < 128).any() for word in words), "no text"
    assert (words[0] != words[1]).any()
    with image.open(show(store, 0, tmp_path / "film.gif")) as moving:
        assert moving.n_frames == env.episode_length
        assert moving.size == (width, height)


def test_show_from_the_command_line(
    toys: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", str(toys.path), "--episode", "3"]) == 0
    assert (tmp_path / "toys-episode3.png").exists()
    for words, message in (
        (["--episode", "14"], "has episodes 0..13, got 14"),
        (["--out", "x.jpg"], "must end in .png or .gif"),
        (["--frames", "0"], "frames and fps must be positive"),
    ):
        capsys.readouterr()
        assert main(["data", "show", str(toys.path), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    meta = json.loads((toys.path / "meta.json").read_text())
    (toys.path / "meta.json").write_text(json.dumps({**meta, "env": {"kind": "of another version"}}))
    assert main(["data", "show", str(toys.path)]) == 0


def trajectory(seed: int, length: int = 7, size: int = 9, **changes: Any) -> dict[str, np.ndarray]:
    """As Memory Maze publishes them."""
    rng = np.random.default_rng(seed)
    n = {9: 3, 15: 6}[size]
    layout = rng.integers(0, 2, (size, size), dtype=np.uint8)
    shapes = {"agent_pos": 2, "agent_dir": 2, "target_pos": 2, "target_vec": 2, "target_color": 3}
    return {
        "image": rng.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8),
        "action": np.eye(6)[rng.integers(0, 6, length)],
        "reward": (rng.random(length) < 0.3).astype(np.float64),
        "maze_layout": np.repeat(layout[None], length, axis=0),
        "targets_pos": rng.random((length, n, 2)),
        "targets_vec": rng.random((length, n, 2)),
        **{key: rng.random((length, width)) for key, width in shapes.items()},
        **changes,
    }


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    for i in range(3):
        np.savez_compressed(folder / f"t{i}.npz", **trajectory(i))
    return folder


def test_published_trajectories_are_read(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", str(published), "--out", str(tmp_path / "store"), "--workers", "1"]) == 0
    assert "3 episodes, 21 frames" in capsys.readouterr().out
    store = EpisodeStore.open(tmp_path / "store", verify=True)
    assert store.env_config == MemoryMaze.Config(9, steps=6)
    assert check(store.path).sound
    for i in range(3):
        given, read = trajectory(i), store.episode(i)
        for key in KEYS:
            if key != "action":
                assert read[key].dtype == (np.uint8 if key in ("image", "maze_layout") else np.float32)
                assert (read[key] == given[key].astype(read[key].dtype)).all(), key
        assert read["action"][1:].tolist() == given["action"][1:].argmax(axis=1).tolist()
        assert read["action"][0] == 0
        assert np.flatnonzero(read["is_first"]).tolist() == [0]
        assert np.flatnonzero(read["is_last"]).tolist() == [6]
        assert not read["is_terminal"].any()
    before = file_bytes(store.path)
    import_memory_maze(published, store.path)
    assert file_bytes(store.path) == before


def test_a_damaged_trajectory_is_named_and_what_came_before_is_kept(published: Path, tmp_path: Path) -> None:
    import_memory_maze(published, tmp_path / "whole")
    good = (published / "t1.npz").read_bytes()
    damages: list[tuple[bytes | dict[str, np.ndarray], str]] = [
        (good[:-30], "is damaged"),
        (good[: len(good) // 2] + bytes(40) + good[len(good) // 2 + 40 :], "is damaged"),
        (b"", "is damaged"),
        (b"no archive", "is damaged"),
        (trajectory(1, image=np.zeros((7, 32, 32, 3), np.uint8)), "'image' is .*, expected"),
        (trajectory(1, action=np.full((7, 6), 1.0)), "actions are not one-hot"),
        (trajectory(1, action=np.full((7, 6), 0.5)), "actions are not one-hot"),
        (trajectory(1, reward=np.full(7, np.nan)), "not finite"),
        (trajectory(1, size=15), "'maze_layout' is .*, expected"),
        ({k: v for k, v in trajectory(1).items() if k != "agent_dir"}, "lacks agent_dir"),
        (trajectory(1, maze_layout=np.arange(7 * 81, dtype=np.uint8).reshape(7, 9, 9)), "'maze_layout' changes"),
    ]
    for damage, message in damages:
        if isinstance(damage, bytes):
            (published / "t1.npz").write_bytes(damage)
        else:
            np.savez_compressed(published / "t1.npz", **damage)
        with pytest.raises(DataError, match=message) as error:
            import_memory_maze(published, tmp_path / "store")
        assert "t1.npz" in str(error.value)
        assert "\n" not in str(error.value)
        assert json.loads((partial_path(tmp_path / "store") / "progress.json").read_text())["n_episodes"] == 1
    (published / "t1.npz").write_bytes(good)
    import_memory_maze(published, tmp_path / "store")
    assert file_bytes(tmp_path / "store") == file_bytes(tmp_path / "whole")


def test_folders_that_hold_no_trajectories(published: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz trajectories; there are some in .*published"):
        import_memory_maze(tmp_path, tmp_path / "store")
    np.savez_compressed(published / "t0.npz", **trajectory(0, maze_layout=np.zeros((7, 10, 10), np.uint8)))
    with pytest.raises(DataError, match="mazes are 9, 11, 13, 15 wide, got 10"):
        import_memory_maze(published, tmp_path / "store")
    with pytest.raises(ConfigError, match="unknown split 'eval'"):
        import_memory_maze(published, tmp_path / "store", "eval")
    assert not (tmp_path / "store").exists()
    collect(TOY, 3, 0, tmp_path / "store")
    np.savez_compressed(published / "t0.npz", **trajectory(0))
    with pytest.raises(DataError, match="holds other episodes"):
        import_memory_maze(published, tmp_path / "store")


@pytest.mark.parametrize("env", [TOY, TILES], ids=lambda env: env.kind)
@pytest.mark.filterwarnings("default")
def test_minari_gives_back_what_it_was_given(env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    store = collect(env, 5, 0, tmp_path / "store")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    assert export_minari(store, tmp_path / "sets" / "episodes") == tmp_path / "sets" / "episodes-v0" / "data"
    dataset = minari.load_dataset("episodes-v0")
    assert dataset.total_episodes == 5
    assert dataset.total_steps == 5 * (env.episode_length - 1)
    assert dataset.action_space.n == 3
    for i, episode in enumerate(dataset.iterate_episodes()):
        stored = store.episode(i)
        assert (episode.observations == stored[env.observation]).all()
        assert dataset.observation_space.contains(episode.observations[0])
        assert episode.actions.tolist() == stored["action"][1:].tolist()
        assert episode.rewards.tolist() == stored["reward"][1:].tolist()
        assert episode.terminations.tolist() == stored["is_terminal"][1:].tolist()
        assert (episode.terminations | episode.truncations).tolist() == stored["is_last"][1:].tolist()
        for key in store.keys:
            if key not in (env.observation, "action", "reward", "is_first", "is_last", "is_terminal"):
                assert (episode.infos[key] == stored[key]).all(), key
    with pytest.raises(DataError, match="exists already"):
        export_minari(store, tmp_path / "sets" / "episodes-v0")


def test_without_minari_the_extra_is_named(
    toys: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    assert main(["data", "export", str(toys.path), "--to", "minari", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "recollect: exporting to Minari needs it: pip install 'recollect[minari]'\n"
    assert not (tmp_path / "out-v0").exists()


def test_without_pillow_the_extra_is_named(toys: EpisodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(RecollectError, match=r"pip install 'recollect\[report\]'"):
        show(toys, 0, tmp_path / "x.png")
