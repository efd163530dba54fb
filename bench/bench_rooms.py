"""Frames a second of the rooms and mazes on one core: drawn, and generated whole.

    python bench/bench_rooms.py [OUTPUT.json]

"draw": pictures of states that the scripted policy visits, domes included. "generate": everything that ``generate``
does for a block, from the plans to the keys for probes. "policy": walking alone. "step": through gymnasium.
Compilation is not counted; every rate is the best of several short runs, and a second is one of CPU time: all of this
runs on one thread, and machines are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect import __version__
from recollect.envs import ENVS, Maze, Rooms
from recollect.envs.maze import env as mazes
from recollect.envs.rooms import env as rooms
from recollect.envs.rooms.walk import pictures
from recollect.train.runtime import environment


def best_rate(work: Callable[[], Any], items: int, runs: int) -> float:
    """Items per second of CPU time of the fastest of ``runs`` calls, after one that is not counted."""
    work()
    seconds: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(items / min(seconds))


def walks(config: Rooms.Config | Maze.Config, n: int) -> tuple[Any, Any, Callable[[], Any]]:
    """The scenes and states of n episodes, and what walks them again."""
    rng = np.random.default_rng(0)
    if isinstance(config, Maze.Config):
        mazes_drawn = mazes.draw(config, rng, n)
        states = mazes.script(config, mazes_drawn).states
        return mazes_drawn.scene, states, lambda: mazes.script(config, mazes_drawn)
    drawn = rooms.draw(config, rng, n)
    return drawn.scene, rooms.script(config, drawn).states, lambda: rooms.script(config, drawn)


def stepped(config: Rooms.Config | Maze.Config, n_steps: int) -> Callable[[], None]:
    """Steps of random actions."""
    env = config.build()
    actions = np.random.default_rng(0).integers(config.n_actions, size=n_steps).tolist()

    def run() -> None:
        env.reset(seed=0)
        for action in actions:
            env.step(action)

    return run


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Rates by environment."""
    found: dict[str, dict[str, float]] = {}
    for name, config in ENVS.items():
        if not isinstance(config, Rooms.Config | Maze.Config):
            continue
        T, n = config.episode_length, 4
        scene, states, walk = walks(config, n)
        rng = np.random.default_rng(0)
        found[name] = {
            "draw": best_rate(
                lambda scene=scene, states=states: pictures(scene, states[:, ::4]), n * len(range(0, T, 4)), runs
            ),
            "generate": best_rate(lambda config=config, rng=rng: config.generate(rng, 2), 2 * T, runs),
            "policy": best_rate(walk, n * T, runs),
            "step": best_rate(stepped(config, 200), 200, runs),
        }
        print(f"{name:22}" + "".join(f"{kind} {rate:>10,.0f}   " for kind, rate in found[name].items()), flush=True)
    return found


def main() -> None:
    """Print the rates and, where a path is given, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=5, help="how often each is measured")
    arguments = parser.parse_args()
    rates = measure(arguments.runs)
    if arguments.output is not None:
        facts = environment(torch.device("cpu"))
        machine = {key: facts[key] for key in ("device", "commit", "python")} | {"load": os.getloadavg()[0]}
        result = {"recollect": __version__, "numpy": np.__version__, **machine, "frames_per_second": rates}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
