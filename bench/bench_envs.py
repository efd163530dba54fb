"""Rates of episode simulation, rendering, collection, window reading and task generation on one machine.

    python bench/bench_envs.py [OUTPUT.json]

Every rate is the best of several short runs, in items per second of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect import __version__
from recollect.data import Windows, collect, observations
from recollect.envs import ENVS, DistractingMemory, EnvConfig
from recollect.eval.pictures import render_on
from recollect.tasks import TASKS, JointRecall
from recollect.tasks.joint_recall import published_stream
from recollect.train.runtime import environment

GRID_WORLDS = [name for name, config in ENVS.items() if config.observation == "tiles"]
"""What shows pictures has its own script, ``bench_rooms.py``."""


def best_rate(work: Callable[[], Any], items: int, runs: int = 7) -> float:
    """Items per second of the fastest of ``runs`` calls, after one that is not counted."""
    work()
    seconds: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return round(items / min(seconds))


def step_episode(config: EnvConfig) -> None:
    """One scripted episode through the gymnasium interface."""
    env = config.build()
    env.reset(seed=0)
    for action in env.scripted_actions().tolist():
        env.step(action)


def measure_environment(config: EnvConfig, runs: int) -> dict[str, float]:
    """Frames per second, one core: scripted episodes as they are stored, pictures of stored tiles, and stepping."""
    rng = np.random.default_rng(0)
    T = config.episode_length
    n = max(1, 50_000 // T)
    rates = {
        "simulate": best_rate(lambda: config.generate(rng, n), n * T, runs),
        "step": best_rate(lambda: step_episode(config), T, runs),
    }
    if config.observation == "tiles":
        tiles = {"tiles": config.generate(rng, max(1, 2_000 // T))["tiles"]}
        rates["render"] = best_rate(lambda: observations(tiles, "pixels"), tiles["tiles"].size // 25, runs)
        on_device = torch.from_numpy(tiles["tiles"])
        rates["render with torch"] = best_rate(lambda: render_on(on_device), tiles["tiles"].size // 25, runs)
    return rates


def measure() -> dict[str, float]:
    """The rates of what follows the environments, by name."""
    rng = np.random.default_rng(0)
    config = DistractingMemory.Config(width=100)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = collect(config, 1024, 0, Path(folder) / "store")
        rates["collect to disk, frames/s"] = round(store.n_steps / (time.perf_counter() - start))
        whole, short = Windows(store), Windows(store, 100, keys=("tiles", "action", "reward", "is_first"))
        rates["read whole episodes, episodes/s"] = best_rate(lambda: whole.sample(rng, 32), 32)
        rates["read windows of 100, windows/s"] = best_rate(lambda: short.sample(rng, 32), 32)
        rates["read and render windows of 100, frames/s"] = best_rate(
            lambda: observations(short.sample(rng, 8), "pixels"), 800
        )
    task = JointRecall()
    for size in ((5, 5), (16, 16)):
        rates[f"joint recall {size[0]}x{size[1]}, samples/s"] = best_rate(
            lambda size=size: task.batch(rng, 128, size=size), 128
        )
    for name, described in TASKS.items():
        each = described.build()
        rates[f"{name}, mixed sizes, samples/s"] = best_rate(lambda each=each: each.mixed_batch(rng, 128), 128)
    rates["published joint recall, samples/s"] = best_rate(lambda: list(islice(published_stream(), 1440)), 1440)
    return rates


def main() -> None:
    """Print the rates and, where a path is given, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument(
        "--env",
        nargs="*",
        choices=list(ENVS),
        help="these only; default: grid worlds, stores, tasks",
    )
    parser.add_argument("--runs", type=int, default=7, help="runs of which the best counts (default: 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environments: dict[str, dict[str, float]] = {}
    for name in arguments.env or GRID_WORLDS:
        environments[name] = measure_environment(ENVS[name], arguments.runs)
        print(f"{name:25}", *(f"{what} {rate:>11,.0f}" for what, rate in environments[name].items()), "frames/s")
    rates = {} if arguments.env else measure()
    for name, rate in rates.items():
        print(f"{name:45} {rate:>12,.0f}")
    if arguments.output is not None:
        facts = environment(torch.device("cpu"))
        machine = {key: facts[key] for key in ("device", "commit", "python")} | {"load": os.getloadavg()[0]}
        result = {"recollect": __version__, "numpy": np.__version__, **machine}
        result |= {"environments": environments, "rates": rates}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
