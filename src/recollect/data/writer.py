"""Writing an episode store so that a kill at any moment does no harm.

Everything is written into ``<path>.partial``. Blocks of episodes are appended to the flat files, and ``progress.json``,
replaced atomically after each block, says how much of them counts. Whoever comes back cuts the files to that length and
goes on. When all is there, ``meta.json`` is written and the directory is renamed: a store is complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from recollect import __version__
from recollect.core.config import differences
from recollect.core.errors import DataError
from recollect.core.files import write_atomically

SCHEMA = 1
"""Raised whenever an older reader would misread the files."""
INDEX = "index"
REQUIRED = ("action", "is_first")


def partial_path(path: Path) -> Path:
    """Where an unfinished store lies."""
    return path.with_name(path.name + ".partial")


class StoreWriter:
    """Appends blocks of episodes, then ``finish``. Continues what an earlier writer of the same store left.

    ``identity`` is plain JSON data that says what is being written (environment, seed, split, ...). Raises DataError if
    ``path`` exists, if something else was left unfinished there, or if another process writes to it at the same time.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        if self.path.exists():
            raise DataError(f"{self.path} exists already: remove it or choose another path")
        self._progress: dict[str, Any] = {
            "identity": {"schema": SCHEMA, "recollect": __version__, **identity},
            "n_blocks": 0,
            "n_episodes": 0,
            "n_steps": 0,
            "keys": {INDEX: {"dtype": "<i8", "shape": [2]}},
        }
        self.partial.mkdir(parents=True, exist_ok=True)
        if (self.partial / "progress.json").exists():
            self._resume()
        elif any(self.partial.glob("*.npy")):
            raise DataError(f"{self.partial} holds something else: remove it or choose another path")
        else:
            _replace(self.partial / "progress.json", self._progress)
        for key in self._progress["keys"]:
            self._truncate(key)

    @property
    def n_blocks(self) -> int:
        """Blocks that are safely written."""
        return self._progress["n_blocks"]

    def append(self, block: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write n episodes of T steps, arrays (n, T, ...); episodes of several lengths are several blocks.

        Raises DataError where keys, types or shapes are not those of the blocks before.
        """
        for key in REQUIRED:
            if key not in block:
                raise DataError(f"{self.path}: an episode needs '{key}', got {', '.join(sorted(block))}")
        n, length = block["action"].shape[:2]
        specs = {key: {"dtype": array.dtype.str, "shape": list(array.shape[2:])} for key, array in block.items()}
        for key, array in block.items():
            if array.shape[:2] != (n, length):
                raise DataError(f"{self.path}: key '{key}' is {array.shape}, but action is ({n}, {length})")
        if self.n_blocks == 0:
            self._progress["keys"] |= specs
            for key in specs:
                self._truncate(key)
        elif changed := differences({k: v for k, v in self._progress["keys"].items() if k != INDEX}, specs):
            raise DataError(f"{self.path}: block {self.n_blocks} differs from those before it ({changed[0]})")

        starts = self._progress["n_steps"] + length * np.arange(n, dtype=np.int64)
        self._append(INDEX, np.stack([starts, np.full(n, length)], axis=1))
        for key, array in block.items():
            self._append(key, array)
        self._progress |= {
            "n_blocks": self.n_blocks + 1,
            "n_episodes": self._progress["n_episodes"] + n,
            "n_steps": self._progress["n_steps"] + n * length,
        }
        _replace(self.partial / "progress.json", self._progress)

    def finish(self) -> None:
        """Write headers, checksums and ``meta.json``, and put the store where it belongs."""
        if self._progress["n_episodes"] == 0:
            raise DataError(f"{self.path}: a store needs at least one episode")
        files: dict[str, Any] = {}
        for key, spec in self._progress["keys"].items():
            with self._file(key).open("r+b") as file:
                self._check_size(file.seek(0, os.SEEK_END), key)
                file.seek(0)
                file.write(_header(spec, self._rows(key)))
                _flush(file)
            files[key] = {**spec, "bytes": self._file(key).stat().st_size, "sha256": checksum(self._file(key))}
        counts = {name: self._progress[name] for name in ("n_episodes", "n_steps")}
        _replace(self.partial / "meta.json", {**self._progress["identity"], **counts, "files": files})
        self.partial.rename(self.path)
        (self.path / "progress.json").unlink()

    def _resume(self) -> None:
        try:
            left = json.loads((self.partial / "progress.json").read_text())
            changed = differences(left["identity"], self._progress["identity"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.partial} is damaged: remove it and start again") from None
        if changed:
            raise DataError(f"{self.partial} is another unfinished store ({changed[0]}): finish it or remove it")
        self._progress = left

    def _file(self, key: str) -> Path:
        return self.partial / f"{key}.npy"

    def _rows(self, key: str) -> int:
        return self._progress["n_episodes" if key == INDEX else "n_steps"]

    def _size(self, key: str) -> int:
        """Bytes that count: the header and every committed row."""
        spec = self._progress["keys"][key]
        return len(_header(spec, 0)) + self._rows(key) * _row_bytes(spec)

    def _truncate(self, key: str) -> None:
        """Drop what a killed writer appended but did not commit; a new file gets its header."""
        path = self._file(key)
        if self._rows(key) == 0:
            path.write_bytes(_header(self._progress["keys"][key], 0))
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


def _row_bytes(spec: Mapping[str, Any]) -> int:
    return int(np.prod(spec["shape"], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def _header(spec: Mapping[str, Any], rows: int) -> bytes:
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
