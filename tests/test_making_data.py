"""Data that is kept on disk is made before anything runs: told of, in several processes, stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from recollect.core.errors import DataError, RecollectError
from recollect.data import EpisodeStore
from recollect.envs import DistractingMemory
from recollect.recipes import load_recipe
from recollect.train import world
from recollect.train.loop import StoppedError, train
from recollect.train.run import FaceOff, RunConfig
from recollect.train.sweep import make_data
from recollect.train.world import WorldConfig


class Counts:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def __call__(self, title: str) -> Generator[Callable[[int, int], None]]:
        told = self.told.setdefault(title, [])
        yield lambda done, total: told.append((done, total))

    def last(self) -> list[tuple[int, int]]:
        return [told[-1] for told in self.told.values() if told]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def small(row: str = "s5") -> RunConfig:
    """A run on 160 episodes, three blocks of them."""
    run = load_recipe("demo-smoke").pick(row, "world")
    assert isinstance(run.problem, WorldConfig)
    block = DistractingMemory.Config.block_episodes
    return replace(run, problem=replace(run.problem, n_episodes=2 * block + 32), train=replace(run.train, steps=2))


def stores(data: Path) -> list[str]:
    return sorted(path.name for path in data.iterdir() if path.is_dir())


def test_a_faceoff_makes_each_store_once_and_tells_how_far_it_is(tmp_path: Path, data: Path) -> None:
    faceoff = FaceOff("worlds", "Two rows", (small("s5"), small("gru")))
    counts = Counts()
    make_data(faceoff, tmp_path / "out", counts, workers=2)
    assert len(stores(data)) == 3
    assert all(done == total for done, total in counts.last())
    train_store = next(path for path in data.iterdir() if path.is_dir() and "train" in path.name)
    assert EpisodeStore.open(train_store).n_episodes == 2 * DistractingMemory.Config.block_episodes + 32
    again = Counts()
    make_data(faceoff, tmp_path / "out", again)
    assert again.told
    assert not again.last()


def test_what_cannot_be_made_is_left_to_the_runs_to_tell(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DataError("no room")

    monkeypatch.setattr(world, "collect", full)
    make_data(FaceOff("worlds", "One row", (small(),)), tmp_path / "out", Counts())
    assert not stores(data)
    with pytest.raises(DataError, match="no room"):
        train(small(), tmp_path / "run", counting=Counts())


def test_a_run_is_stopped_while_its_data_is_made_and_goes_on(tmp_path: Path, data: Path) -> None:
    with pytest.raises(StoppedError, match=r"stopped after \d+ of \d+ of the data"):
        train(small(), tmp_path / "run", counting=Counts(), stop=lambda: True)
    assert not [name for name in stores(data) if not name.endswith(".partial")]
    counts = Counts()
    results = train(small(), tmp_path / "run", counting=counts)
    assert results["steps"] == 2
    first = next(iter(counts.told.values()))
    assert first[0][0] > DistractingMemory.Config.block_episodes, "the block that was made was not made again"


def test_a_device_that_is_not_there_is_told_before_any_data_is_made(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RecollectError, match="device"):
        train(small(), tmp_path / "run", device="nonsense", counting=Counts())
    assert not data.exists()
