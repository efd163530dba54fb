"""How the keys of an episode lie on disk, and how they come back.

What a file holds a row for is its ``per``:

=========  =========================================================================================================
``step``   every frame
``episode``  every episode: a key that does not change within one (``EnvConfig.constant``)
``end``    every episode: a flag that is only ever set at the last frame (``is_terminal``)
``block``  every block of episodes: bookkeeping
=========  =========================================================================================================

``is_first`` and ``is_last`` follow from where episodes begin and end; they have no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import DataError

Array: TypeAlias = npt.NDArray[Any]
Index: TypeAlias = npt.NDArray[np.int64]

REQUIRED = ("action", "is_first")
DERIVED = ("is_first", "is_last")
AT_END = "is_terminal"
DIGEST_BYTES = 16


class Encoded(NamedTuple):
    """A block of n episodes of T steps as it is appended to the files. Files are in the order of their names."""

    n: int
    length: int
    files: dict[str, Array]
    specs: dict[str, dict[str, Any]]
    digests: npt.NDArray[np.uint8]
    """(files, 16) BLAKE2b of the rows of every file."""


def encode(block: Mapping[str, Array], constant: Sequence[str] = ()) -> Encoded:
    """The rows that a block, arrays (n, T, ...), adds to every file.

    Raises DataError where a required key is missing, shapes do not fit, a flag is not where episodes begin and end, or
    a key of ``constant`` changes within an episode. Cost: a hash of every byte that is stored.
    """
    for key in REQUIRED:
        if key not in block:
            raise DataError(f"an episode needs '{key}', got {', '.join(sorted(block))}")
    n, length = block["action"].shape[:2]
    if n * length == 0:
        raise DataError(f"a block needs at least one episode of one step, got ({n}, {length})")
    for key, array in block.items():
        if array.shape[:2] != (n, length):
            raise DataError(f"key '{key}' is {array.shape}, but action is ({n}, {length})")
        if array.dtype.hasobject:
            raise DataError(f"key '{key}' holds Python objects; store numbers")
    _check_flags(block)
    files, specs = dict[str, Array](), dict[str, dict[str, Any]]()
    for key in sorted(block.keys() - set(DERIVED)):
        array, per = block[key], "step"
        if key == AT_END:
            array, per = array[:, -1], "end"
        elif key in constant:
            if (array != array[:, :1]).any():
                raise DataError(f"key '{key}' changes within an episode, but it is declared constant")
            array, per = array[:, 0], "episode"
        shape = list(block[key].shape[2:])
        files[key] = np.ascontiguousarray(array).reshape(-1, *shape)
        specs[key] = {"dtype": array.dtype.str, "shape": shape, "per": per}
    digests = np.stack([digest(array) for array in files.values()])
    return Encoded(n, length, files, specs, digests)


def digest(rows: Array) -> npt.NDArray[np.uint8]:
    """BLAKE2b (16,) of the bytes of an array."""
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return np.frombuffer(hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest(), dtype=np.uint8)


def _check_flags(block: Mapping[str, Array]) -> None:
    for key in (*DERIVED, AT_END):
        if key in block and block[key].dtype != np.bool_:
            raise DataError(f"key '{key}' must be bool, got {block[key].dtype}")
    first = block["is_first"]
    if not first[:, 0].all() or first[:, 1:].any():
        raise DataError("is_first must be True exactly at the first step of every episode")
    last = block.get("is_last")
    if last is not None and (not last[:, -1].all() or last[:, :-1].any()):
        raise DataError("is_last must be True exactly at the last step of every episode")
    if AT_END in block and block[AT_END][:, :-1].any():
        raise DataError(f"{AT_END} may be True only at the last step of an episode")


class Spans(NamedTuple):
    """B windows of one length, each within an episode."""

    episode: Index
    start: Index
    """(B,) first step, counted over the whole store."""
    length: int


class Column(Protocol):
    """One key of a store."""

    def flat(self) -> Array:
        """(n_steps, ...), read-only."""
        ...

    def episode(self, i: int) -> Array:
        """(T, ...), read-only."""
        ...

    def windows(self, spans: Spans) -> Array:
        """(B, T, ...), with memory of its own."""
        ...


@dataclass(frozen=True)
class Steps:
    """A row for every step."""

    array: Array
    index: Index

    def flat(self) -> Array:
        return self.array

    def episode(self, i: int) -> Array:
        offset, length = self.index[i].tolist()
        return self.array[offset : offset + length]

    def windows(self, spans: Spans) -> Array:
        # One contiguous copy per window, several times faster than an index per step.
        window = np.empty((len(spans.start), spans.length, *self.array.shape[1:]), dtype=self.array.dtype)
        for row, start in enumerate(spans.start.tolist()):
            window[row] = self.array[start : start + spans.length]
        return window


@dataclass(frozen=True)
class Constant:
    """A row for every episode."""

    array: Array
    index: Index

    def flat(self) -> Array:
        return _fixed(np.repeat(self.array, self.index[:, 1], axis=0))

    def episode(self, i: int) -> Array:
        return np.broadcast_to(self.array[i], (int(self.index[i, 1]), *self.array.shape[1:]))

    def windows(self, spans: Spans) -> Array:
        return np.repeat(self.array[spans.episode][:, None], spans.length, axis=1)


@dataclass(frozen=True)
class Flags:
    """A flag at the first or at the last step of the episodes that are ``marked``."""

    marked: npt.NDArray[np.bool_]
    index: Index
    at_end: bool

    def flat(self) -> Array:
        flags = np.zeros(int(self.index[:, 1].sum()), dtype=np.bool_)
        flags[self._steps()] = self.marked
        return _fixed(flags)

    def episode(self, i: int) -> Array:
        flags = np.zeros(int(self.index[i, 1]), dtype=np.bool_)
        flags[-1 if self.at_end else 0] = self.marked[i]
        return _fixed(flags)

    def windows(self, spans: Spans) -> Array:
        flags = np.zeros((len(spans.start), spans.length), dtype=np.bool_)
        column = spans.length - 1 if self.at_end else 0
        flags[:, column] = (self._steps()[spans.episode] == spans.start + column) & self.marked[spans.episode]
        return flags

    def _steps(self) -> Index:
        return self.index[:, 0] + self.index[:, 1] - 1 if self.at_end else self.index[:, 0]


def _fixed(array: Array) -> Array:
    array.setflags(write=False)
    return array
