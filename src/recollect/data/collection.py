"""Filling an episode store with the scripted episodes of an environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recollect.core.ahead import Make, WorkerDiedError, made_ahead
from recollect.core.cluster import made_on_cluster
from recollect.core.config import differences, to_dict
from recollect.core.errors import ConfigError, DataError, nearest
from recollect.core.seeding import Streams
from recollect.data.columns import Encoded, encode
from recollect.data.store import EpisodeStore
from recollect.data.writer import StoreWriter
from recollect.envs import EnvConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a store, by number: block b of a split comes from the stream ("env", split, b) of ``seed``."""

    env: EnvConfig
    n_episodes: int
    seed: int
    split: str

    def __len__(self) -> int:
        return (self.n_episodes + self.env.block_episodes - 1) // self.env.block_episodes

    def __call__(self) -> Make:
        """What makes a block: in this process, in a worker, or on a cluster."""
        return self.make

    def make(self, number: int) -> Encoded:
        """Block ``number``; the last one is cut to ``n_episodes``."""
        size = self.env.block_episodes
        frames = self.env.generate(Streams(self.seed).numpy("env", self.split, number), size)
        wanted = min(size, self.n_episodes - number * size)
        return encode({key: array[:wanted] for key, array in frames.items()}, self.env.constant)


def collect(
    env: EnvConfig,
    n_episodes: int,
    seed: int,
    path: str | os.PathLike[str],
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 0,
    ray: str | None = None,
) -> EpisodeStore:
    """A store of ``n_episodes`` scripted episodes at ``path``, written unless it is there already.

    Blocks are made in this process, by ``workers`` processes, or with ``ray`` (an address, "" for Ray's own rule) on a
    cluster; one writer appends them in order. The bytes do not depend on when, where or in how many attempts they were
    made, splits share nothing, and a shorter store is the beginning of a longer one. After a kill, the same call goes
    on where the last one stopped. ``progress(done, n_episodes)`` is called after every block. Memory: a few blocks for
    every worker.

    Raises ConfigError for an unknown split, ``n_episodes`` below 1 or ``workers`` below 0; DataError if something else
    lies at ``path`` (or its unfinished ``.partial``), if the disk is full, or if a worker was killed; RecollectError
    without Ray.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}'{nearest(split, SPLITS)}")
    if n_episodes < 1:
        raise ConfigError(f"n_episodes must be at least 1, got {n_episodes}")
    if workers < 0:
        raise ConfigError(f"workers must not be negative, got {workers}; 0 makes episodes in this process")
    path = Path(path)
    identity = {
        "env": to_dict(env),
        "n_actions": env.n_actions,
        "block_episodes": env.block_episodes,
        "seed": seed,
        "split": split,
        "n_episodes": n_episodes,
    }
    if path.exists():
        store = EpisodeStore.open(path)
        if changed := differences({key: store.meta.get(key) for key in identity}, identity):
            raise DataError(f"{path} holds other episodes ({changed[0]}): remove it or choose another path")
        (path / "progress.json").unlink(missing_ok=True)
        return store

    with StoreWriter(path, identity, env.constant) as writer:
        fill(writer, Blocks(env, n_episodes, seed, split), n_episodes, progress, workers, ray)
    return EpisodeStore.open(path)


class Source(Protocol):
    """Numbered blocks of episodes; it travels to the processes that make them."""

    def __len__(self) -> int: ...

    def __call__(self) -> Make:
        """What makes the block of a number, ``Encoded``."""
        ...


def fill(
    writer: StoreWriter,
    blocks: Source,
    n_episodes: int,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
    ray: str | None = None,
) -> None:
    """Append every block that is not written yet, in order, and finish the store. Raises as ``collect`` does."""
    left = range(writer.n_blocks, len(blocks))
    if not left or (ray is None and not workers):
        way = nullcontext(blocks())
    else:
        way = made_ahead(blocks, left, workers) if ray is None else made_on_cluster(blocks, left, ray)
    with way as make:
        for number in left:
            try:
                block = make(number)
            except WorkerDiedError as how:
                raise DataError(
                    f"the process that was to make block {number} {how}; the {writer.n_episodes} episodes in "
                    f"{writer.partial} are kept: run the same command again, with fewer workers if memory ran out"
                ) from None
            writer.append(block)
            if progress is not None:
                progress(writer.n_episodes, n_episodes)
    writer.finish()
