"""The episode store: a directory of flat arrays, all episodes one after the other.

::

    tiles.npy action.npy reward.npy ...    (n_steps, ...) one file per key
    cue.npy is_terminal.npy ...            (n_episodes, ...) for keys that need one row per episode (``data.columns``)
    index.npy                              (n_episodes, 2) int64: offset and length of every episode
    blocks.npy digests.npy                 episodes of every block it was written in, and checksums of its rows
    meta.json                              schema, environment, seed, split, version; type and size of every file

Files are memory-mapped: opening costs nothing and reading a window costs its bytes. Probing targets are ordinary keys.
A damaged byte spoils the episodes of its block and no others; ``data.check`` names them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from recollect.core.config import from_dict
from recollect.core.errors import DataError, nearest
from recollect.data.columns import AT_END, Array, Column, Constant, Flags, Index, Steps, digest
from recollect.data.writer import BLOCKS, BOOKKEEPING, DIGESTS, INDEX, SCHEMA, StoreWriter, checksum, partial_path
from recollect.envs import EnvConfig


class Part(NamedTuple):
    """The rows of one block in one file."""

    key: str
    block: int
    rows: slice
    digest: npt.NDArray[np.uint8]


class EpisodeStore:
    """Read-only episodes. ``store[key]`` is the flat array (n_steps, ...), ``store.episode(i)`` one episode."""

    def __init__(self, path: Path, meta: dict[str, Any], arrays: dict[str, Array]) -> None:
        self.path = path
        self.meta = meta
        self.index: Index = np.array(arrays[INDEX])
        self.files = arrays
        """The mapped files, each with a row for what its ``per`` says in ``meta["files"]``."""
        self._columns = {key: self._column(key) for key in arrays if key not in BOOKKEEPING}
        everywhere = np.ones(len(self.index), dtype=np.bool_)
        self._columns["is_first"] = Flags(everywhere, self.index, at_end=False)
        self._columns["is_last"] = Flags(everywhere, self.index, at_end=True)

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
        constant: Sequence[str] = (),
    ) -> Self:
        """Write blocks of episodes, arrays (n, T, ...), and open the result.

        ``env`` is the config of the environment as plain data. If an earlier call with the same arguments was killed,
        the blocks it wrote are taken from ``blocks`` but not written again. Raises DataError as ``StoreWriter`` does.
        """
        identity = {"env": dict(env), "n_actions": n_actions, "seed": seed, "split": split}
        with StoreWriter(path, identity, constant) as writer:
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
        meta = read_meta(path)
        try:
            arrays = {key: _map(path / f"{key}.npy", spec, verify) for key, spec in meta["files"].items()}
            store = cls(path, meta, arrays)
            fits = store._fits()
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path / 'meta.json'} is damaged: make the store again") from None
        if not fits:
            raise DataError(f"{path} is damaged: its index does not match its files; make it again")
        if verify and (part := next((part for part in store.parts() if not store.sound(part)), None)) is not None:
            raise DataError(
                f"{path / part.key}.npy is damaged: its checksum differs in block {part.block}; "
                f"what is lost: recollect data check {path}"
            )
        return store

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        """The flat array (n_steps, ...) of a key: a copy where the store has less than a row for every step.

        Raises DataError naming the nearest known key.
        """
        return self.column(key).flat()

    def column(self, key: str) -> Column:
        """A key as it is stored, for reading parts of it. Raises DataError naming the nearest known key."""
        if key not in self._columns:
            raise DataError(f"{self.path} has no key '{key}'{nearest(key, self._columns)}")
        return self._columns[key]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of everything that an episode has."""
        return tuple(self._columns)

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
        """Every key of one episode, (T, ...), read-only and without a copy of what is large."""
        return {key: column.episode(i) for key, column in self._columns.items()}

    @cached_property
    def blocks(self) -> Index:
        """(n_blocks + 1,) the first episode of every block, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.files[BLOCKS])])

    def parts(self) -> Iterable[Part]:
        """What has a checksum: block after block, the rows of every file."""
        keys = [key for key in sorted(self.files) if key not in BOOKKEEPING]
        for block, digests in enumerate(self.files[DIGESTS]):
            first, end = self.blocks[block : block + 2].tolist()
            steps = slice(int(self.index[first, 0]), int(self.index[end - 1].sum()))
            for key, expected in zip(keys, digests, strict=True):
                rows = steps if self.meta["files"][key]["per"] == "step" else slice(first, end)
                yield Part(key, block, rows, expected)

    def sound(self, part: Part) -> bool:
        """Whether the bytes of a part are those that were written."""
        return bool((digest(self.files[part.key][part.rows]) == part.digest).all())

    def _column(self, key: str) -> Column:
        array = self.files[key]
        if self.meta["files"][key]["per"] == "step":
            return Steps(array, self.index)
        return Flags(array, self.index, at_end=True) if key == AT_END else Constant(array, self.index)

    def _fits(self) -> bool:
        """Whether index, blocks and the numbers of rows say the same."""
        counts = {"step": self.n_steps, "end": self.n_episodes, "episode": self.n_episodes}
        counts["block"] = self.meta["n_blocks"]
        rows = all(len(array) == counts[self.meta["files"][key]["per"]] for key, array in self.files.items())
        ends = np.cumsum(self.index[:, 1])
        return (
            rows
            and self.n_episodes == self.meta["n_episodes"] == self.blocks[-1]
            and np.array_equal(self.index.sum(axis=1), ends)
            and bool(ends[-1] == self.n_steps)
            and self.files[DIGESTS].shape[1] == len(self.files) - len(BOOKKEEPING)
        )


def read_meta(path: Path) -> dict[str, Any]:
    """``meta.json`` of a store. Raises DataError if there is none, or of another schema, or what it cannot be."""
    if not (path / "meta.json").is_file():
        if partial_path(path).exists():
            raise DataError(f"{path} is unfinished: run the command that was making it again")
        if path.exists():
            raise DataError(f"{path} is not an episode store: it has no meta.json")
        raise DataError(f"{path}: no such episode store; make it first: recollect data make ENV --out {path}")
    try:
        meta = json.loads((path / "meta.json").read_text())
        schema = meta["schema"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path / 'meta.json'} is damaged: make the store again") from None
    if schema != SCHEMA:
        version = meta.get("recollect", "unknown")
        raise DataError(
            f"{path} has schema {schema}, this version reads {SCHEMA}: make it again, or use recollect {version}"
        )
    return meta


def _map(path: Path, spec: Mapping[str, Any], verify: bool) -> Array:
    if not path.is_file():
        raise DataError(f"{path} is missing: what can be mended: recollect data check {path.parent}")
    size = path.stat().st_size
    if size != spec["bytes"]:
        raise DataError(
            f"{path} is damaged: {size} bytes, expected {spec['bytes']}; "
            f"what can be mended: recollect data check {path.parent}"
        )
    if verify and "sha256" in spec and checksum(path) != spec["sha256"]:
        raise DataError(f"{path} is damaged: its checksum differs; make the store again")
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise DataError(f"{path} is damaged: its header cannot be read; recollect data check {path.parent}") from None
    if array.dtype.str != spec["dtype"] or list(array.shape[1:]) != spec["shape"]:
        raise DataError(f"{path} is damaged: its header differs from meta.json; recollect data check {path.parent}")
    # A plain view: slicing a np.memmap costs several times more than slicing an array over the same pages.
    return array.view(np.ndarray)
