"""Writing an episode store so that a kill at any moment does no harm.

Everything is written into ``<path>.partial``. Blocks of episodes are appended to the flat files, and ``progress.json``,
replaced atomically after each block, says how much of them counts. Whoever comes back cuts the files to that length and
goes on. When all is there, ``meta.json`` is written and the directory is renamed: a store is complete or not there.
Checksums are taken block by block on the way, so finishing reads nothing again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from recollect import __version__
from recollect.core.config import differences
from recollect.core.errors import DataError, RecollectError
from recollect.core.files import lock_directory, write_atomically
from recollect.data.columns import DIGEST_BYTES, Encoded, encode

SCHEMA = 2
"""Raised whenever an older reader would misread the files."""
INDEX, BLOCKS, DIGESTS = "index", "blocks", "digests"
BOOKKEEPING = (INDEX, BLOCKS, DIGESTS)


def partial_path(path: Path) -> Path:
    """Where an unfinished store lies."""
    return path.with_name(path.name + ".partial")


class StoreWriter:
    """Appends blocks of episodes, then ``finish``. Continues what an earlier writer of the same store left.

    ``identity`` is plain JSON data that says what is being written (environment, seed, split, ...); ``constant`` names
    the keys that are stored once for every episode. Raises DataError if ``path`` exists, if something else was left
    unfinished there, if another process writes to it at the same time, and where the disk is full: what was appended
    before stays, and another writer goes on from there.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], constant: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self.constant = tuple(constant)
        if self.path.exists():
            raise DataError(f"{self.path} exists already: remove it or choose another path")
        self._progress: dict[str, Any] = {
            "identity": {"schema": SCHEMA, "recollect": __version__, **identity},
            "n_blocks": 0,
            "n_episodes": 0,
            "n_steps": 0,
            "keys": {},
        }
        with self._kept():
            self.partial.mkdir(parents=True, exist_ok=True)
            try:
                self._unlock = lock_directory(self.partial)
            except BlockingIOError:
                raise DataError(f"{self.partial} is being written by another process: let it finish") from None
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.n_blocks == 0:
            with suppress(OSError, ValueError, KeyError):
                self._clear()
        self.close()

    def close(self) -> None:
        """Let other processes write here. What was appended stays."""
        self._unlock()

    @property
    def n_blocks(self) -> int:
        """Blocks that are safely written."""
        return self._progress["n_blocks"]

    @property
    def n_episodes(self) -> int:
        """Episodes that are safely written."""
        return self._progress["n_episodes"]

    def append(self, block: Mapping[str, npt.NDArray[Any]] | Encoded) -> None:
        """Write n episodes of T steps, arrays (n, T, ...); episodes of several lengths are several blocks.

        Raises DataError as ``encode`` does, and where keys, types or shapes are not those of the blocks before.
        """
        try:
            rows = block if isinstance(block, Encoded) else encode(block, self.constant)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None
        if self.n_blocks == 0:
            with self._kept():
                self._declare(rows.specs)
        elif changed := differences(
            {k: v for k, v in self._progress["keys"].items() if k not in BOOKKEEPING}, rows.specs
        ):
            raise DataError(f"{self.path}: block {self.n_blocks} differs from those before it ({changed[0]})")
        starts = self._progress["n_steps"] + rows.length * np.arange(rows.n, dtype=np.int64)
        with self._kept():
            for key, array in rows.files.items():
                self._append(key, array)
            self._append(INDEX, np.stack([starts, np.full(rows.n, rows.length)], axis=1))
            self._append(BLOCKS, np.array([rows.n], dtype=np.int64))
            self._append(DIGESTS, rows.digests)
            after = {
                **self._progress,
                "n_blocks": self.n_blocks + 1,
                "n_episodes": self.n_episodes + rows.n,
                "n_steps": self._progress["n_steps"] + rows.n * rows.length,
            }
            _replace(self.partial / "progress.json", after)
        self._progress = after

    def finish(self) -> None:
        """Write headers and ``meta.json``, and put the store where it belongs. Cost: a few small writes."""
        if self.n_episodes == 0:
            raise DataError(f"{self.path}: a store needs at least one episode")
        files: dict[str, Any] = {}
        with self._kept():
            for key, spec in self._progress["keys"].items():
                with self._file(key).open("r+b") as file:
                    self._check_size(file.seek(0, os.SEEK_END), key)
                    file.seek(0)
                    file.write(header(spec, self._rows(key)))
                    _flush(file)
                files[key] = {**spec, "bytes": self._size(key)}
                if key in BOOKKEEPING:
                    files[key]["sha256"] = checksum(self._file(key))
            counts = {name: self._progress[name] for name in ("n_blocks", "n_episodes", "n_steps")}
            _replace(self.partial / "meta.json", {**self._progress["identity"], **counts, "files": files})
            self.partial.rename(self.path)
        with suppress(OSError):
            (self.path / "progress.json").unlink()
        self.close()

    def _begin(self) -> None:
        with self._kept():
            if (self.partial / "progress.json").exists():
                self._resume()
            elif any(self.partial.glob("*.npy")):
                raise DataError(f"{self.partial} holds something else: remove it or choose another path")
            else:
                _replace(self.partial / "progress.json", self._progress)
            for stray in self.partial.glob(".*.partial"):  # of a writer that was killed while it wrote one
                stray.unlink()
            for key in self._progress["keys"]:
                self._truncate(key)

    def _resume(self) -> None:
        try:
            left = json.loads((self.partial / "progress.json").read_text())
            changed = differences(left["identity"], self._progress["identity"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.partial} is damaged: remove it and start again") from None
        if changed:
            raise DataError(f"{self.partial} is another unfinished store ({changed[0]}): finish it or remove it")
        self._progress = left

    def _declare(self, specs: Mapping[str, Any]) -> None:
        """The keys are those of the first block. A block that failed may have left files: they begin again."""
        self._progress["keys"] = {
            **specs,
            INDEX: {"dtype": "<i8", "shape": [2], "per": "episode"},
            BLOCKS: {"dtype": "<i8", "shape": [], "per": "block"},
            DIGESTS: {"dtype": "|u1", "shape": [len(specs), DIGEST_BYTES], "per": "block"},
        }
        for key in self._progress["keys"]:
            self._truncate(key)

    @contextmanager
    def _kept(self) -> Generator[None]:
        """A disk that is full, or gone, ends in one line; what does not count is cut off, which frees space."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RecollectError) as error:
            for key in self._progress["keys"] if self.partial.exists() else ():
                with suppress(OSError, DataError):
                    self._truncate(key)
            why = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
            kept = f"its {self.n_episodes} episodes are kept: run the same command again when there is room"
            raise DataError(
                f"{self.partial} cannot be written: {why}; "
                f"{kept if self.n_episodes else 'mend that and run the same command again'}"
            ) from None

    def _clear(self) -> None:
        """Leave nothing where nothing was written, which the disk knows better: an interrupt comes at any moment."""
        if json.loads((self.partial / "progress.json").read_text())["n_blocks"]:
            return
        for name in ("progress.json", *(f"{key}.npy" for key in self._progress["keys"])):
            (self.partial / name).unlink(missing_ok=True)
        self.partial.rmdir()

    def _file(self, key: str) -> Path:
        return self.partial / f"{key}.npy"

    def _rows(self, key: str) -> int:
        return rows_of(self._progress["keys"][key], self._progress)

    def _size(self, key: str) -> int:
        """Bytes that count: the header and every committed row."""
        spec = self._progress["keys"][key]
        return len(header(spec, 0)) + self._rows(key) * row_bytes(spec)

    def _truncate(self, key: str) -> None:
        """Drop what a killed writer appended but did not commit; a new file gets its header."""
        path = self._file(key)
        if self._rows(key) == 0:
            path.write_bytes(header(self._progress["keys"][key], 0))
        elif not path.exists() or path.stat().st_size < self._size(key):
            raise DataError(f"{path} is damaged: remove {self.partial} and start again")
        os.truncate(path, self._size(key))

    def _check_size(self, size: int, key: str) -> None:
        if size != self._size(key):
            raise DataError(f"{self.partial} is being written by another process: let it finish")

    def _append(self, key: str, array: npt.NDArray[Any]) -> None:
        with self._file(key).open("ab") as file:
            self._check_size(file.tell(), key)
            file.write(np.ascontiguousarray(array).data)
            _flush(file)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of(spec: Mapping[str, Any], counts: Mapping[str, Any]) -> int:
    """Rows of a file of a store with these ``n_blocks``, ``n_episodes`` and ``n_steps``."""
    unit = {"step": "n_steps", "episode": "n_episodes", "end": "n_episodes", "block": "n_blocks"}[spec["per"]]
    return counts[unit]


def row_bytes(spec: Mapping[str, Any]) -> int:
    """Bytes of one row."""
    return int(np.prod(spec["shape"], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def header(spec: Mapping[str, Any], rows: int) -> bytes:
    """A ``.npy`` header. NumPy pads it so that its length does not depend on the number of rows."""
    buffer = BytesIO()
    shape = (rows, *spec["shape"])
    np.lib.format.write_array_header_1_0(buffer, {"descr": spec["dtype"], "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=2, sort_keys=True).encode())
