"""The episode store: a directory of flat arrays with time as their first axis.

::

    tiles.npy action.npy reward.npy ...    (n_steps, ...) one file per key, all episodes one after the other
    index.npy                              (n_episodes, 2) int64: offset and length of every episode
    meta.json                              schema, environment, seed, split, version; size and SHA-256 of every file

Files are memory-mapped: opening costs nothing and reading a window costs its bytes. Probing targets are ordinary keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from recollect.core.config import from_dict
from recollect.core.errors import DataError, nearest
from recollect.data.writer import INDEX, SCHEMA, StoreWriter, checksum, partial_path
from recollect.envs import EnvConfig


class EpisodeStore:
    """Read-only episodes. ``store[key]`` is the flat array (n_steps, ...), ``store.episode(i)`` one episode."""

    def __init__(self, path: Path, meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.path = path
        self.meta = meta
        self.index: npt.NDArray[np.int64] = np.array(arrays[INDEX])
        self._arrays = {key: array for key, array in arrays.items() if key != INDEX}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        blocks: Iterable[Mapping[str, npt.NDArray[Any]]],
        *,
        env: Mapping[str, Any],
        n_actions: int,
        seed: int,
        split: str,
    ) -> Self:
        """Write blocks of episodes, arrays (n, T, ...), and open the result.

        ``env`` is the config of the environment as plain data. If an earlier call with the same arguments was killed,
        the blocks it wrote are taken from ``blocks`` but not written again. Raises DataError as ``StoreWriter`` does.
        """
        writer = StoreWriter(path, {"env": dict(env), "n_actions": n_actions, "seed": seed, "split": split})
        done = writer.n_blocks
        for i, block in enumerate(blocks):
            if i >= done:
                writer.append(block)
        writer.finish()
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Self:
        """Map the files of a store; ``verify`` also reads every byte and compares checksums.

        Raises DataError if the store is missing, unfinished or of another schema, or if a file is damaged.
        """
        path = Path(path)
        meta = _read_meta(path)
        arrays: dict[str, npt.NDArray[Any]] = {}
        try:
            for key, spec in meta["files"].items():
                arrays[key] = _map(path / f"{key}.npy", spec, verify)
            store = cls(path, meta, arrays)
            rows = {key: len(array) for key, array in store._arrays.items()}
            whole = store.n_episodes == meta["n_episodes"] and set(rows.values()) == {meta["n_steps"]}
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path / 'meta.json'} is damaged: collect the store again") from None
        ends = np.cumsum(store.index[:, 1])
        if not (whole and np.array_equal(store.index[:, 0] + store.index[:, 1], ends) and ends[-1] == store.n_steps):
            raise DataError(f"{path} is damaged: its index does not match its files; collect it again")
        return store

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        """The flat array (n_steps, ...) of a key. Raises DataError naming the nearest known key."""
        if key not in self._arrays:
            raise DataError(f"{self.path} has no key '{key}'{nearest(key, self._arrays)}")
        return self._arrays[key]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all arrays but the index."""
        return tuple(self._arrays)

    @property
    def n_episodes(self) -> int:
        """Episodes in the store."""
        return len(self.index)

    @property
    def n_steps(self) -> int:
        """Frames of all episodes together."""
        return self.meta["n_steps"]

    @property
    def n_actions(self) -> int:
        """Width of a one-hot action."""
        return self.meta["n_actions"]

    @property
    def env_config(self) -> EnvConfig:
        """Config of the environment that made it. Raises ConfigError if this version does not know it."""
        env = self.meta["env"]
        return from_dict(EnvConfig, env, f"{self.path / 'meta.json'}: env")

    def episode(self, i: int) -> dict[str, npt.NDArray[Any]]:
        """Every key of one episode, (T, ...), as read-only views of the files."""
        offset, length = self.index[i]
        return {key: array[offset : offset + length] for key, array in self._arrays.items()}


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        if partial_path(path).exists():
            raise DataError(f"{path} is unfinished: run the command that was collecting it again")
        if path.exists():
            raise DataError(f"{path} is not an episode store: it has no meta.json")
        raise DataError(f"{path}: no such episode store; collect it first")
    try:
        meta = json.loads((path / "meta.json").read_text())
        schema = meta["schema"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path / 'meta.json'} is damaged: collect the store again") from None
    if schema != SCHEMA:
        version = meta.get("recollect", "unknown")
        raise DataError(f"{path} has schema {schema}, this version reads {SCHEMA}: use recollect {version}")
    return meta


def _map(path: Path, spec: Mapping[str, Any], verify: bool) -> npt.NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing: collect the store again")
    size = path.stat().st_size
    if size != spec["bytes"]:
        raise DataError(f"{path} is damaged: {size} bytes, expected {spec['bytes']}; collect the store again")
    if verify and checksum(path) != spec["sha256"]:
        raise DataError(f"{path} is damaged: its checksum differs; collect the store again")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise DataError(f"{path} is damaged: its header cannot be read; collect the store again") from None
    if array.dtype.str != spec["dtype"] or list(array.shape[1:]) != spec["shape"]:
        raise DataError(f"{path} is damaged: its header differs from meta.json; collect the store again")
    # A plain view: slicing a np.memmap costs several times more than slicing an array over the same pages.
    return array.view(np.ndarray)
