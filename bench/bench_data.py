"""Rates of making, checking and reading stores on one machine.

    python bench/bench_data.py [OUTPUT.json] [--megabytes 400]

Windows are read with a warm cache, in one thread, beside a bare memory map that does nothing but copy their frames.
Reading rates are medians of seven rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect import __version__
from recollect.data import EpisodeStore, Windows, collect
from recollect.data.check import check
from recollect.envs import find
from recollect.train.runtime import environment

FRAME, LENGTH, WINDOW, BATCH = (64, 64, 3), 500, 100, 32


def pictures(megabytes: int) -> Iterator[dict[str, Any]]:
    """Blocks of one episode of random pictures."""
    rng = np.random.default_rng(0)
    first = np.arange(LENGTH) == 0
    for _ in range(max(2, round(megabytes * 1e6 / (LENGTH * np.prod(FRAME))))):
        yield {
            "image": rng.integers(0, 256, (1, LENGTH, *FRAME), dtype=np.uint8),
            "action": rng.integers(0, 6, (1, LENGTH), dtype=np.uint8),
            "reward": np.zeros((1, LENGTH), dtype=np.float32),
            "is_first": first[None],
        }


def rates_in_turn(ways: dict[str, Callable[[], Any]], items: int, rounds: int = 7) -> dict[str, float]:
    """Items per second of every way: the median of rounds in which each runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: items / statistics.median(times) for name, times in seconds.items()}


def reading(folder: Path, megabytes: int) -> dict[str, float]:
    """Windows per second from a store of pictures, and from its file alone."""
    store = EpisodeStore.create(
        folder / "pictures", pictures(megabytes), env={"kind": "pictures"}, n_actions=6, seed=0, split="train"
    )
    check(store.path)  # which also warms the cache
    everything, only = Windows(store, WINDOW), Windows(store, WINDOW, keys=("image",))
    bare = np.load(store.path / "image.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    starts = rng.integers(len(bare) - WINDOW, size=BATCH).tolist()
    numbers = rng.integers(len(everything), size=BATCH)

    def copy() -> None:
        batch = np.empty((BATCH, WINDOW, *FRAME), dtype=np.uint8)
        for row, start in enumerate(starts):
            batch[row] = bare[start : start + WINDOW]

    ways = {
        "bare memory map, windows/s": copy,
        "windows of pictures, windows/s": lambda: only.batch_at(numbers),
        "windows of every key, windows/s": lambda: everything.batch_at(numbers),
    }
    return rates_in_turn(ways, BATCH)


def making(folder: Path) -> dict[str, float]:
    """10,000 episodes of distracting-memory-100: seconds by the number of workers, and megabytes."""
    env, found = find("distracting-memory-100"), dict[str, float]()
    for workers in (0, 2):
        start = time.perf_counter()
        store = collect(env, 10_000, 0, folder / f"workers{workers}", workers=workers)
        found[f"10,000 episodes with {workers} workers, s"] = time.perf_counter() - start
    start = time.perf_counter()
    assert check(store.path).sound
    found["check 10,000 episodes, s"] = time.perf_counter() - start
    found["10,000 episodes, MB"] = sum(file.stat().st_size for file in store.path.iterdir()) / 1e6
    return found


def main() -> None:
    """Print what was measured and, where a path is given, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--megabytes", type=int, default=400, help="size of the store of pictures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = making(Path(folder)) | reading(Path(folder), arguments.megabytes)
    for name, value in found.items():
        print(f"{name:45} {value:>12,.1f}")
    if arguments.output is not None:
        facts = environment(torch.device("cpu"))
        machine = {key: facts[key] for key in ("device", "commit", "python")} | {"load": os.getloadavg()[0]}
        result = {"recollect": __version__, "numpy": np.__version__, **machine, "measured": found}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
