"""What dreams go on from: frames of episodes that happened, from any step on and any number of them, in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from recollect.core.errors import ConfigError
from recollect.data import EpisodeStore, Windows
from recollect.data.windows import unbroken
from recollect.models.world_model import Batch

Ints: TypeAlias = npt.NDArray[np.int64]

Contexts: TypeAlias = Callable[[Ints, Ints, int], Batch]
"""From episodes (n,), first steps (n,) and a number of frames T to aligned windows (n, T, ...), as the model sees."""


class StoredContexts:
    """Contexts from an episode store; ``see`` makes what the model sees of what is stored (None: it is the same).

    Raises DataError for an episode that there is not, and for one that is too short.
    """

    def __init__(self, store: EpisodeStore, see: Callable[[Batch], Batch] | None = None) -> None:
        self.store, self.see = store, see
        self._keys = (store.env_config.observation, "action", "reward", "is_first", "is_terminal")

    def __call__(self, episodes: Ints, starts: Ints, length: int) -> Batch:
        windows = Windows(self.store, length, keys=self._keys)
        where = zip(episodes.tolist(), starts.tolist(), strict=True)
        arrays = windows.batch_at([windows.number(episode, start) for episode, start in where])
        tensors = (torch.from_numpy(arrays[key]) for key in self._keys)
        batch = Batch(*tensors, unbroken=unbroken(arrays["is_first"]))
        return batch if self.see is None else self.see(batch)


def together(contexts: Contexts, spans: Ints) -> Batch:
    """The windows ``spans`` (n, 3), each (episode, first step, frames), as one batch whose rows all end at its end.

    Shorter rows begin later, with a first step: whatever stands before it is forgotten, in every layer (law *reset*).
    Raises ConfigError for a span without frames, and where ``contexts`` gives windows of another size.
    """
    lengths = spans[:, 2]
    longest = int(lengths.max())
    if lengths.min() < 1:
        raise ConfigError(f"a context has at least 1 frame, got {lengths.min()}")
    whole: Batch | None = None
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        part = contexts(spans[rows, 0], spans[rows, 1], length)
        if (got := tuple(part.is_first.shape)) != (len(rows), length):
            raise ConfigError(f"asked for {len(rows)} contexts of {length} frames, got {got}")
        if len(rows) == len(spans):
            return part
        if whole is None:
            whole = part.each(lambda x: x.new_zeros(len(spans), longest, *x.shape[2:]))._replace(unbroken=False)
        for field, values in zip(whole.tensors, part.tensors, strict=True):
            field[rows, longest - length :] = values
        whole.is_first[rows, longest - length] |= length < longest
    assert whole is not None
    return whole
