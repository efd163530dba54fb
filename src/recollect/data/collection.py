"""Filling an episode store with the scripted episodes of an environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from recollect.core.config import differences, to_dict
from recollect.core.errors import ConfigError, DataError, nearest
from recollect.core.seeding import Streams
from recollect.data.store import EpisodeStore
from recollect.data.writer import StoreWriter
from recollect.envs import EnvConfig

SPLITS = ("train", "valid", "test")


def collect(
    env: EnvConfig,
    n_episodes: int,
    seed: int,
    path: str | os.PathLike[str],
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeStore:
    """A store of ``n_episodes`` scripted episodes at ``path``, written unless it is there already.

    Block b of a split is drawn from the stream ("env", split, b) of ``seed``: the bytes do not depend on when or in how
    many attempts they were written, splits share nothing, and a shorter store is the beginning of a longer one. After a
    kill, the same call goes on where the last one stopped. ``progress(done, n_episodes)`` is called after every block.

    Raises ConfigError for an unknown environment or split or ``n_episodes`` below 1, DataError if something else lies
    at ``path`` (or its unfinished ``.partial``).
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}'{nearest(split, SPLITS)}")
    if n_episodes < 1:
        raise ConfigError(f"n_episodes must be at least 1, got {n_episodes}")
    path = Path(path)
    identity = {
        "env": to_dict(env),
        "n_actions": env.n_actions,
        "seed": seed,
        "split": split,
        "n_episodes": n_episodes,
    }
    if path.exists():
        store = EpisodeStore.open(path)
        if changed := differences({key: store.meta.get(key) for key in identity}, identity):
            raise DataError(f"{path} holds other episodes ({changed[0]}): remove it or choose another path")
        return store

    writer = StoreWriter(path, identity)
    n_blocks = -(-n_episodes // env.block_episodes)
    for b in range(writer.n_blocks, n_blocks):
        wanted = min(env.block_episodes, n_episodes - b * env.block_episodes)
        block = env.generate(Streams(seed).numpy("env", split, b), env.block_episodes)
        writer.append({key: array[:wanted] for key, array in block.items()})
        if progress is not None:
            progress(b * env.block_episodes + wanted, n_episodes)
    writer.finish()
    return EpisodeStore.open(path)
