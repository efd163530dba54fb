"""Reading Memory Maze's published trajectories into a store: a folder of one ``.npz`` each.

A trajectory has T frames (1001 as published) under ``KEYS``, each an array with time first. ``action`` is one-hot and
led to the frame it stands beside, as in our stores; the first one stands for none.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recollect.core.ahead import Make
from recollect.core.config import to_dict
from recollect.core.errors import ConfigError, DataError, nearest
from recollect.data.collection import SPLITS, fill
from recollect.data.columns import Encoded, encode
from recollect.data.store import EpisodeStore
from recollect.data.writer import StoreWriter
from recollect.envs.memory_maze import PROBES, SIZES, MemoryMaze

KEYS = ("image", "action", "reward", *PROBES)
BYTES = ("image", "maze_layout")
UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises over a file that is no whole ``.npz``."""


@dataclass(frozen=True)
class Trajectories:
    """The episodes of a folder, one block each, in the order of their names."""

    files: tuple[Path, ...]
    config: MemoryMaze.Config

    def __len__(self) -> int:
        return len(self.files)

    def __call__(self) -> Make:
        return self.make

    def make(self, number: int) -> Encoded:
        """One trajectory as a block."""
        path = self.files[number]
        arrays = read(path)
        n = self.config.n_targets
        shapes = {
            "image": self.config.observation_shape,
            "action": (self.config.n_actions,),
            "reward": (),
            "maze_layout": (self.config.size, self.config.size),
            "targets_pos": (n, 2),
            "targets_vec": (n, 2),
            "target_color": (3,),
        }
        length = len(arrays["image"])
        for key, array in arrays.items():
            expected = (length, *shapes.get(key, (2,)))
            if array.shape != expected:
                raise DataError(f"{path} is damaged: '{key}' is {array.shape}, expected {expected}")
        block: dict[str, npt.NDArray[Any]]
        block = {key: arrays[key].astype(np.uint8 if key in BYTES else np.float32, copy=False) for key in KEYS}
        if any(not np.isfinite(block[key]).all() for key in KEYS if key not in BYTES):
            raise DataError(f"{path} is damaged: it holds numbers that are not finite")
        block["action"] = _index(block["action"], path)
        for key, at in (("is_first", 0), ("is_last", -1), ("is_terminal", None)):
            block[key] = np.zeros(length, dtype=np.bool_)
            if at is not None:
                block[key][at] = True
        try:
            return encode({key: array[None] for key, array in block.items()}, self.config.constant)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def import_memory_maze(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 0,
) -> EpisodeStore:
    """A store of the trajectories in the folder ``source``. A call that was killed goes on where it was.

    Raises ConfigError for an unknown split; DataError naming the file where one is damaged (those before it are kept),
    where there is none, and where ``path`` holds something else.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}'{nearest(split, SPLITS)}")
    source, path = Path(source), Path(path)
    files = tuple(sorted(source.glob("*.npz")))
    if not files:
        below = sorted({str(found.parent) for found in source.glob("*/*.npz")})
        hint = f"; there are some in {', '.join(below)}" if below else ""
        raise DataError(f"{source} holds no .npz trajectories{hint}")
    config = _config(files[0])
    identity: dict[str, Any] = {
        "env": to_dict(config),
        "n_actions": config.n_actions,
        "seed": None,
        "split": split,
        "n_episodes": len(files),
        "source": "memory-maze npz",
        "names": hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest(),
    }
    if path.exists():
        store = EpisodeStore.open(path)
        if any(store.meta.get(key) != value for key, value in identity.items()):
            raise DataError(f"{path} holds other episodes: remove it or choose another path")
        return store
    with StoreWriter(path, identity, config.constant) as writer:
        fill(writer, Trajectories(files, config), len(files), progress, workers)
    return EpisodeStore.open(path)


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one trajectory. Raises DataError naming the file where it cannot be read or lacks a key."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            missing = [key for key in KEYS if key not in data]
            if missing:
                raise DataError(f"{path} is no trajectory of Memory Maze: it lacks {', '.join(missing)}")
            return {key: data[key] for key in KEYS}
    except UNREADABLE as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is damaged ({why}): fetch it again, then run the same command") from None


def _config(path: Path) -> MemoryMaze.Config:
    arrays = read(path)
    size, length = arrays["maze_layout"].shape[-1], len(arrays["image"])
    if size not in SIZES:
        raise DataError(f"{path}: mazes are {', '.join(map(str, SIZES))} wide, got {size}")
    return MemoryMaze.Config(size, steps=length - 1)


def _index(one_hot: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    ones = (one_hot == 1).sum(axis=1)
    zeros = (one_hot == 0).sum(axis=1)
    width = one_hot.shape[1]
    if ((ones + zeros) != width).any() or (ones[1:] != 1).any() or ones[0] > 1:
        raise DataError(f"{path} is damaged: actions are not one-hot")
    index = one_hot.argmax(axis=1).astype(np.uint8)
    index[0] = 0
    return index
