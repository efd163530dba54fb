"""Writing a store as a Minari dataset (extra ``minari``; its format is described at minari.farama.org).

An episode of T frames becomes T observations and infos, and T - 1 actions, rewards, terminations and truncations:
Minari's action t follows observation t, ours precedes it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from recollect import __version__
from recollect.core.errors import DataError, RecollectError
from recollect.data.store import EpisodeStore
from recollect.envs.tiles import N_CODES

DERIVED = ("action", "reward", "is_first", "is_last", "is_terminal")


def export_minari(
    store: EpisodeStore, path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write a Minari dataset at ``path``, lossless; returns the folder of its data.

    The dataset's name is that of the folder, with ``-v0`` where it has no version: with ``MINARI_DATASETS_PATH`` set to
    the folder above, ``minari.load_dataset(name)`` finds it. Probing keys come as infos. Cost: one episode in memory.
    Raises RecollectError without Minari, DataError where ``path`` exists or the disk is full; nothing is left then.
    """
    try:
        minari = importlib.import_module("minari")
        storages = importlib.import_module("minari.dataset.minari_storage")
        buffers = importlib.import_module("minari.data_collector.episode_buffer")
        importlib.import_module("h5py")
    except ImportError:
        raise RecollectError("exporting to Minari needs it: pip install 'recollect[minari]'") from None
    path = Path(path)
    if not re.search(r"-v\d+$", path.name):
        path = path.with_name(f"{path.name}-v0")
    if path.exists():
        raise DataError(f"{path} exists already: remove it or choose another path")
    seen = next((key for key in ("tiles", "image") if key in store.keys), None)
    if seen is None or "reward" not in store.keys:
        raise DataError(f"{store.path} has no observations ('tiles' or 'image') or no rewards to export")
    sample = store.column(seen).episode(0)
    low, high = 0, N_CODES - 1 if seen == "tiles" else 255
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "data").mkdir(parents=True)
        storage = storages.MinariStorage.new(
            partial / "data",
            observation_space=spaces.Box(low, high, sample.shape[1:], np.uint8),
            action_space=spaces.Discrete(store.n_actions),
            jpeg_encoding=False,
        )
        about = f"{store.meta['env'].get('kind')}, split {store.meta['split']}, made by recollect {__version__}"
        storage.update_metadata({"dataset_id": path.name, "minari_version": minari.__version__, "description": about})
        storage.update_episodes(_episodes(store, seen, buffers.EpisodeBuffer, progress))
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path / "data"


def _episodes(
    store: EpisodeStore, seen: str, buffer: Callable[..., Any], progress: Callable[[int, int], None] | None
) -> Iterator[Any]:
    for i in range(store.n_episodes):
        episode = store.episode(i)
        ends = np.zeros((2, len(episode["action"]) - 1), dtype=np.bool_)
        terminal = bool(episode["is_terminal"][-1]) if "is_terminal" in episode else False
        ends[0 if terminal else 1, -1:] = True
        yield buffer(
            id=i,
            observations=np.array(episode[seen]),
            actions=episode["action"][1:].astype(np.int64),
            rewards=episode["reward"][1:].astype(np.float64),
            terminations=ends[0],
            truncations=ends[1],
            infos={key: np.array(array) for key, array in episode.items() if key not in (seen, *DERIVED)},
        )
        if progress is not None:
            progress(i + 1, store.n_episodes)
