"""Whether a store holds what was written into it, which episodes are spoilt where it does not, and mending them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recollect.core.config import from_dict
from recollect.core.errors import DataError, RecollectError
from recollect.data.collection import Blocks
from recollect.data.columns import Array, Index, digest
from recollect.data.store import read_meta
from recollect.data.writer import BLOCKS, BOOKKEEPING, DIGESTS, INDEX, checksum, header, row_bytes, rows_of
from recollect.envs import EnvConfig
from recollect.envs.tiles import N_CODES


@dataclass
class Report:
    """What ``check`` found."""

    path: Path
    n_episodes: int
    n_steps: int
    bytes: int
    problems: list[str] = field(default_factory=list[str])
    """A line each, naming the file and the episodes."""
    bad: set[int] = field(default_factory=set[int])
    """Episodes that cannot be relied on."""
    damaged: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    """File -> blocks whose bytes are not those that were written; what ``mend`` makes again."""

    @property
    def sound(self) -> bool:
        """Whether all is well."""
        return not self.problems

    def note(self, what: str, episodes: Iterable[int]) -> None:
        """Put down a problem of some episodes."""
        found = sorted(set(episodes))
        self.problems.append(f"{what}; episodes {ranges(found)}")
        self.bad.update(found)


class _Files:
    """The files of a store as they are, with no trust in any of them but ``meta.json``."""

    def __init__(self, path: Path) -> None:
        self.path, self.meta = path, read_meta(path)
        try:
            self.specs: dict[str, dict[str, Any]] = self.meta["files"]
            self.index: Index = self._kept(INDEX)
            self.ends: Index = np.cumsum(self._kept(BLOCKS))
            self.digests = self._kept(DIGESTS)
            self.keys = [key for key in sorted(self.specs) if key not in BOOKKEEPING]
            self.rows = {key: rows_of(self.specs[key], self.meta) for key in self.keys}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path / 'meta.json'} is damaged: make the store again") from None

    def block(self, number: int) -> range:
        """Its episodes."""
        return range(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))

    def rows_in(self, key: str, episodes: range) -> range:
        """Rows of a file that belong to consecutive episodes."""
        if self.specs[key]["per"] != "step":
            return episodes
        return range(int(self.index[episodes[0], 0]), int(self.index[episodes[-1]].sum()))

    def read(self, key: str, rows: range) -> Array | None:
        """Rows of a file; None where it ends before them."""
        spec = self.specs[key]
        try:
            with (self.path / f"{key}.npy").open("rb") as file:
                file.seek(self.offset(key, rows.start))
                data = file.read(len(rows) * row_bytes(spec))
        except OSError:
            return None
        if len(data) != len(rows) * row_bytes(spec):
            return None
        return np.frombuffer(data, dtype=spec["dtype"]).reshape(len(rows), *spec["shape"])

    def offset(self, key: str, row: int) -> int:
        return len(header(self.specs[key], 0)) + row * row_bytes(self.specs[key])

    def _kept(self, key: str) -> Array:
        """A bookkeeping file: without it nothing can be said of any episode."""
        path, spec = self.path / f"{key}.npy", self.meta["files"][key]
        if not path.is_file() or checksum(path) != spec["sha256"]:
            raise DataError(f"{path} is damaged, and with it the whole store: remove {self.path} and make it again")
        return np.load(path, allow_pickle=False)


def check(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Report:
    """Read every byte of a store: schema, sizes, checksums, and whether values are what they can be.

    Actions lie in 0 .. ``n_actions`` - 1, tile codes are known, numbers are finite, and the environment's observation
    has its shape. Raises DataError where the store is missing, unfinished, of another schema, or its bookkeeping is
    damaged. ``progress(blocks done, n_blocks)``. Memory: one block.
    """
    files = _Files(Path(path))
    meta = files.meta
    size = sum(spec["bytes"] for spec in files.specs.values())
    report = Report(files.path, len(files.index), int(meta["n_steps"]), size)
    everyone = range(len(files.index))
    env = _env(files)
    for key in files.keys:
        file, spec = files.path / f"{key}.npy", files.specs[key]
        if not file.is_file():
            report.problems.append(f"{key}.npy is missing")
            continue
        with file.open("rb") as opened:
            if opened.read(len(header(spec, 0))) != header(spec, files.rows[key]):
                report.problems.append(f"{key}.npy: its header is damaged")
        if file.stat().st_size > spec["bytes"]:
            report.problems.append(f"{key}.npy: {file.stat().st_size - spec['bytes']} bytes too many")
    if env is not None:
        shape = files.specs.get(env.observation, {}).get("shape")
        if shape != list(env.observation_shape):
            report.note(
                f"{env.observation}.npy: {shape} per frame, but {env.kind} shows {env.observation_shape}", everyone
            )
    for number in range(len(files.ends)):
        _check_block(files, number, report)
        if progress is not None:
            progress(number + 1, len(files.ends))
    return report


def _check_block(files: _Files, number: int, report: Report) -> None:
    episodes = files.block(number)
    for key, expected in zip(files.keys, files.digests[number], strict=True):
        rows = files.rows_in(key, episodes)
        data = files.read(key, rows)
        if data is None or (digest(data) != expected).any():
            what = "its checksum differs" if data is not None else "the file ends before them"
            report.note(f"{key}.npy: {what}", episodes)
            report.damaged.setdefault(key, set()).add(number)
        elif (wrong := _impossible(key, data, files.meta["n_actions"])) is not None:
            what, where = wrong
            at = np.asarray(rows)[np.flatnonzero(where.reshape(len(rows), -1).any(axis=1))]
            per_step = files.specs[key]["per"] == "step"
            spoilt = np.searchsorted(files.index[:, 0], at, side="right") - 1 if per_step else at
            report.note(f"{key}.npy: {what}", spoilt.tolist())


def _impossible(key: str, data: Array, n_actions: int) -> tuple[str, Array] | None:
    """What is wrong with the values of a key, and where."""
    if key == "action" and (where := (data < 0) | (data >= n_actions)).any():
        return f"actions outside 0..{n_actions - 1}", where
    if key == "tiles" and (where := data >= N_CODES).any():
        return f"tile codes above {N_CODES - 1}", where
    if data.dtype.kind == "f" and (where := ~np.isfinite(data)).any():
        return "numbers that are not finite", where
    return None


def mend(path: str | os.PathLike[str]) -> int:
    """Make the damaged blocks of a store again, in place; how many there were.

    What is made must have the checksums of what was lost. Raises DataError where it has not (another version of the
    environment), for imported episodes, and as ``check`` does.
    """
    files, report = _Files(Path(path)), check(path)
    lost = sorted(set[int]().union(*report.damaged.values()))
    if lost and ("source" in files.meta or _env(files) is None):
        raise DataError(f"{files.path} was not made by an environment of this version: its lost episodes stay lost")
    meta = files.meta
    for key in files.keys:
        with (files.path / f"{key}.npy").open("r+b" if (files.path / f"{key}.npy").exists() else "w+b") as file:
            file.write(header(files.specs[key], files.rows[key]))
            file.truncate(files.specs[key]["bytes"])
    for number in lost:
        env = from_dict(EnvConfig, meta["env"])
        made = Blocks(env, meta["n_episodes"], meta["seed"], meta["split"]).make(number)
        if not np.array_equal(made.digests, files.digests[number]):
            raise DataError(
                f"{files.path}: this version makes other episodes of {env.kind}; "
                f"mend it with recollect {meta['recollect']}"
            )
        for key in files.keys:
            if number in report.damaged.get(key, ()):
                with (files.path / f"{key}.npy").open("r+b") as file:
                    file.seek(files.offset(key, files.rows_in(key, files.block(number)).start))
                    file.write(made.files[key].data)
    return len(lost)


def stores_below(path: str | os.PathLike[str]) -> list[Path]:
    """The store at ``path``, or those directly below it, as ``data make`` writes several splits."""
    path = Path(path)
    if (path / "meta.json").exists() or not path.is_dir():
        return [path]
    return sorted(found.parent for found in path.glob("*/meta.json")) or [path]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ``0..255, 300``."""
    return ", ".join(f"{a}..{b}" if a != b else str(a) for a, b in _runs(numbers))


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    start = end = None
    for number in numbers:
        if start is None or end is None:
            start = end = number
        elif number == end + 1:
            end = number
        else:
            yield start, end
            start = end = number
    if start is not None and end is not None:
        yield start, end


def _env(files: _Files) -> EnvConfig | None:
    """The environment's config, where this version knows it."""
    try:
        return from_dict(EnvConfig, files.meta["env"])
    except RecollectError:
        return None
