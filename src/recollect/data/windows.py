"""Batches of windows of episodes, and the one place where time is aligned.

At every step t of an episode:

- ``action_t`` is the action that **led to** ``observation_t``, one-hot; at the first step there was none: all zero;
- ``reward_t`` **arrives with** ``observation_t``;
- ``is_first_t`` marks the first step of an episode, ``is_last_t`` its last, and ``is_terminal_t`` a last step after
  which there is no future (an episode that was cut off is last, but not terminal).

So (observation_t, action_{t+1}) predicts (observation_{t+1}, reward_{t+1}), and everything in this package that handles
episodes keeps to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, DataError
from recollect.data.columns import Spans
from recollect.data.store import EpisodeStore
from recollect.envs.tiles import render

Batch: TypeAlias = dict[str, npt.NDArray[Any]]


class Windows:
    """Every window of ``length`` steps that lies within one episode; None: whole episodes, which must be equally long.

    ``len(windows)`` counts them; they are numbered by episode, then by start. ``keys`` restricts what is read.
    Raises ConfigError for a length below 1, DataError if no episode is long enough, if lengths differ, or for an
    unknown key.
    """

    def __init__(self, store: EpisodeStore, length: int | None = None, *, keys: Sequence[str] | None = None) -> None:
        lengths = store.index[:, 1]
        longest = int(lengths.max())
        if length is None and int(lengths.min()) != longest:
            raise DataError(f"{store.path}: episodes have {lengths.min()} to {longest} steps; give a window length")
        if length is not None and length < 1:
            raise ConfigError(f"window length must be at least 1, got {length}")
        if length is not None and length > longest:
            raise DataError(f"{store.path}: the longest episode has {longest} steps, shorter than a window of {length}")
        self.store = store
        self.length = longest if length is None else length
        self._columns = {key: store.column(key) for key in (store.keys if keys is None else keys)}
        # Windows that begin in episodes 0 .. e.
        self._ends = np.cumsum(np.maximum(lengths - self.length + 1, 0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def number(self, episode: int, start: int = 0) -> int:
        """The number of the window that begins at ``start`` of an episode. Raises DataError where there is none."""
        n = len(self._ends)
        if not 0 <= episode < n:
            raise DataError(f"{self.store.path}: episode numbers lie in 0..{n - 1}, got {episode}")
        steps = int(self.store.index[episode, 1])
        if not 0 <= start <= steps - self.length:
            raise DataError(
                f"{self.store.path}: episode {episode} has {steps} steps, no window of {self.length} from step {start}"
            )
        return int(self._ends[episode]) - (steps - self.length + 1) + start

    def sample(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """``batch_size`` windows, uniform with replacement; see ``batch_at``."""
        return self.batch_at(rng.integers(len(self), size=batch_size))

    def batch_at(self, indices: npt.ArrayLike) -> Batch:
        """Windows by number (B,), as arrays (B, T, ...) that own their memory.

        ``action`` comes as one-hot float32 (B, T, n_actions), zero at first steps; the rest as stored. A window that
        starts inside an episode has no first step. Raises DataError for a number outside 0 .. ``len`` - 1.
        Cost: one copy of the bytes returned.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            got = f"{numbers.min()}..{numbers.max()}"
            raise DataError(f"{self.store.path}: window numbers lie in 0..{len(self) - 1}, got {got}")
        episode = np.searchsorted(self._ends, numbers, side="right")
        # The last window of an episode ends with it.
        offset, length = self.store.index[episode].T
        starts = offset + length - self.length - (self._ends[episode] - 1 - numbers)
        spans = Spans(episode, starts, self.length)
        batch = {key: column.windows(spans) for key, column in self._columns.items()}
        if "action" in batch:
            first = batch["is_first"] if "is_first" in batch else self.store.column("is_first").windows(spans)
            batch["action"] = _one_hot(batch["action"], first, self.store.n_actions)
        return batch


def observations(batch: Batch, kind: Literal["tiles", "pixels"]) -> npt.NDArray[np.uint8]:
    """What the model sees: tile codes (B, T, h, w), or pictures in 0..255: those of the batch (B, T, h, w, 3), or
    rendered from its codes (B, T, 8 h, 8 w, 3).

    Raises ConfigError for another kind, or for tiles where there are pictures only.
    """
    if kind not in ("tiles", "pixels"):
        raise ConfigError(f"observations are 'tiles' or 'pixels', got '{kind}'")
    if "tiles" not in batch:
        if kind == "tiles":
            raise ConfigError("these episodes show pictures, not tiles: ask for 'pixels'")
        return batch["image"]
    return batch["tiles"] if kind == "tiles" else render(batch["tiles"])


def _one_hot(action: npt.NDArray[Any], is_first: npt.NDArray[np.bool_], n_actions: int) -> npt.NDArray[np.float32]:
    # Row n_actions of the table is the zero row of a first step.
    table = np.eye(n_actions + 1, n_actions, dtype=np.float32)
    return table[np.where(is_first, n_actions, action)]


def unbroken(is_first: npt.NDArray[np.bool_]) -> bool:
    """Whether every row of (B, T) begins with an episode's first step and holds no other one."""
    return bool(is_first[:, 0].all() and not is_first[:, 1:].any())
